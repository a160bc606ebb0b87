"""Windows of tokens cut from long documents, on which importance is accumulated and fidelity is measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from heapq import heappush, heapreplace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import save_tensors
from hfprune_dist.data.text import Beginning, read_texts
from hfprune_dist.data.tokenizer import bos_id, by_tokenizer, plain_ids
from hfprune_dist.errors import UserError

WINDOWS, INPUT_IDS = "windows.safetensors", "input_ids"
# Limits of what is tokenized before a sweep begins, in search of documents that are long enough: characters per token
# that is needed, plenty in most languages; and characters in all, a few seconds' work.
CHARACTERS_PER_TOKEN, TOKENIZED_CHARACTERS = 16, 2 * 2**20


@dataclass(frozen=True)
class Windows:
    """Token windows and what they were cut from.

    Attributes:
        input_ids_ST: int64 [samples, sequence_length].
        documents_read: documents that were tokenized.
        documents_used: documents that were long enough.
        tokens: number of tokens in the documents used.
    """

    input_ids_ST: Tensor
    documents_read: int
    documents_used: int
    tokens: int


@dataclass(frozen=True)
class Sampling:
    """How windows are cut from documents.

    Attributes:
        samples: number of windows.
        sequence_length: tokens per window, a BOS token included.
        seed: determines the order of documents, and where each window begins.
        add_bos_token: whether every window begins with BOS, if the tokenizer has one.
    """

    samples: int
    sequence_length: int
    seed: int
    add_bos_token: bool = True

    def body(self, tokenizer: Any) -> int:
        """Number of a window's tokens that come from the text."""
        return self.sequence_length - (bos_id(tokenizer, self.add_bos_token) is not None)


def read_windows(
    source: Mapping[str, Any], path: Path | None, tokenizer: Any, sampling: Sampling, where: str
) -> Windows:
    """Cut windows from a text source; a local file's documents are taken in random order.

    Args:
        source: settings of the source (see ``read_texts``), including ``text_field``.
        path: the local file or folder; None streams the hub data set.
        where: what the text is for, for messages.

    Raises:
        UserError: if the text can't be read or no document is long enough.
    """

    def texts() -> Iterator[str]:
        return (text for (text,) in read_texts(source, path, [source["text_field"]], sampling.seed, where))

    order = None if path is None else places_in_random_order(sum(1 for _ in texts()), sampling.seed)
    return sample_windows(texts(), tokenizer, sampling, f"{where} {path or source['dataset']}", order)


def require_long_enough(beginning: Beginning, tokenizer: Any, sampling: Sampling, where: str) -> None:
    """Refuse a source from which ``read_windows`` could cut no window, or that has fewer tokens than all windows
    together. This is checked only if the whole source was read and ``TOKENIZED_CHARACTERS`` of it suffice to tell.

    Args:
        sampling: how windows are cut; a single sample if windows may see a text several times.

    Raises:
        UserError: as ``read_windows`` and ``require_tokens``.
    """
    if (counted := _tokens_if_too_few(beginning, tokenizer, sampling)) is None:
        return
    found, longest = counted
    if not found:
        raise _too_short(where, tokenizer, sampling, len(beginning.texts), longest)
    require_tokens(found, tokenizer, sampling, where)


def remark_on_overlap(beginning: Beginning, tokenizer: Any, sampling: Sampling, where: str) -> str | None:
    """A sentence about a source that has fewer tokens than all its windows together, as far as can be told."""
    counted = _tokens_if_too_few(beginning, tokenizer, sampling)
    if counted is None:
        return None
    needed = sampling.samples * sampling.body(tokenizer)
    return (
        f"{where}: {counted[0]} tokens in documents that are long enough {by_tokenizer(tokenizer)}, and "
        f"{sampling.samples} windows take {needed}: they overlap, and tell less than as many windows of a longer text"
    )


def _tokens_if_too_few(beginning: Beginning, tokenizer: Any, sampling: Sampling) -> tuple[int, int] | None:
    """The tokens in documents that are long enough, and in the longest document.

    None if all windows have tokens enough, or if that can't be told from what was read and is quickly tokenized.
    """
    if not beginning.is_all:
        return None
    body = sampling.body(tokenizer)
    needed = sampling.samples * body
    found = longest = tokenized = 0
    for (text,) in sorted(beginning.texts, key=lambda text: len(text[0]), reverse=True):
        tokens = 0
        for part in _parts_to_try(text, CHARACTERS_PER_TOKEN * (needed - found)):
            tokens = len(plain_ids(tokenizer, part))
            if tokens >= max(body, needed - found):
                return None
            tokenized += len(part)
        longest = max(longest, tokens)
        found += tokens if tokens >= body else 0
        if tokenized > TOKENIZED_CHARACTERS:
            return None
    return found, longest


def require_tokens(found: int, tokenizer: Any, sampling: Sampling, where: str) -> None:
    """Refuse a text that is so short that windows would see much of it several times.

    Args:
        found: tokens in documents that are long enough.

    Raises:
        UserError: if there are fewer than in all windows together; the message states both numbers.
    """
    needed = sampling.samples * sampling.body(tokenizer)
    if found < needed:
        raise UserError(
            f"{where}: {found} tokens in documents that are long enough {by_tokenizer(tokenizer)}, and its share of "
            f"{sampling.samples} windows takes {needed}; give it a smaller weight or more text, or use fewer samples"
        )


def _parts_to_try(text: str, characters: int) -> Sequence[str]:
    """The beginning of a text, which may be enough, and the whole text, which always tells."""
    return [text[:characters], text] if len(text) > characters else [text]


def save_windows(input_ids_ST: Tensor, folder: Path) -> None:
    """Save the exact windows in an artifact, finished or not; readers of earlier ones aren't disturbed."""
    save_tensors({INPUT_IDS: input_ids_ST}, folder / WINDOWS)


def load_windows(folder: Path) -> Tensor:
    """The windows that ``save_windows`` saved, int64 [samples, sequence_length]."""
    windows_ST: Tensor = load_file(folder / WINDOWS)[INPUT_IDS]
    return windows_ST


def sample_windows(
    texts: Iterable[str], tokenizer: Any, sampling: Sampling, where: str, order: Sequence[int] | None = None
) -> Windows:
    """Cut one random window from each document that is long enough; start again if documents run out.

    Args:
        where: the source, for messages.
        order: for each document, its place in the order in which they are used; None: they come in order, and no more
            are read than are needed.

    Raises:
        UserError: if no document is long enough; the message states the longest one's length.
    """
    body, bos = sampling.body(tokenizer), bos_id(tokenizer, sampling.add_bos_token)
    chosen: list[tuple[int, list[int]]] = []  # a heap, of which the last in order is the first; places are negated
    read = longest = 0
    for number, text in enumerate(texts):
        place = number if order is None else order[number]
        if len(chosen) == sampling.samples and place > -chosen[0][0]:
            if order is None:
                break
            continue
        ids = plain_ids(tokenizer, text)
        read = max(read, number + 1)
        longest = max(longest, len(ids))
        if len(ids) >= body:
            (heappush if len(chosen) < sampling.samples else heapreplace)(chosen, (-place, ids))
    if not chosen:
        raise _too_short(where, tokenizer, sampling, read, longest)
    if order is not None and len(chosen) == sampling.samples:
        read = 1 - chosen[0][0]  # those before the last in order; others were read only to find these
    documents = [ids for _, ids in sorted(chosen, reverse=True)]
    generator = torch.Generator().manual_seed(sampling.seed)
    rows = [_window(documents[index % len(documents)], body, bos, generator) for index in range(sampling.samples)]
    return Windows(torch.tensor(rows, dtype=torch.int64), read, len(documents), sum(map(len, documents)))


def places_in_random_order(documents: int, seed: int) -> list[int]:
    """For each document, its place in an order that depends only on their number and the seed."""
    order: list[int] = torch.randperm(documents, generator=torch.Generator().manual_seed(seed)).argsort().tolist()
    return order


def _too_short(where: str, tokenizer: Any, sampling: Sampling, read: int, longest: int) -> UserError:
    return UserError(
        f"{where}: no document has {sampling.body(tokenizer)} tokens {by_tokenizer(tokenizer)} ({read} read, the "
        f"longest has {longest}); use longer documents or a smaller sequence_length"
    )


def _window(ids: list[int], body: int, bos: int | None, generator: torch.Generator) -> list[int]:
    start = int(torch.randint(len(ids) - body + 1, (), generator=generator))
    return ([] if bos is None else [bos]) + ids[start : start + body]
