"""Windows of tokens cut from long documents of one text or several, to accumulate importance and measure fidelity."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappush, heapreplace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import save_tensors
from hfprune_dist.data.text import Beginning, read_texts
from hfprune_dist.data.tokenizer import bos_ids, plain_ids
from hfprune_dist.errors import UserError

WINDOWS, INPUT_IDS = "windows.safetensors", "input_ids"
# Characters that are tokenized before a sweep begins, in search of documents that are long enough: seconds of work.
TOKENIZED_CHARACTERS = 2 * 2**20


@dataclass(frozen=True)
class Sampling:
    """How windows are cut from documents: how many, and of how many tokens each, a BOS token included if the
    tokenizer puts one before a text; ``seed`` determines the order of documents, and where each window begins.
    """

    samples: int
    sequence_length: int
    seed: int
    add_bos_token: bool = True

    def bos(self, tokenizer: Any) -> list[int]:
        """The ids before those that come from the text."""
        return bos_ids(tokenizer) if self.add_bos_token else []

    def body(self, tokenizer: Any) -> int:
        """Number of a window's tokens that come from the text."""
        return self.sequence_length - len(self.bos(tokenizer))


def read_windows(
    source: Mapping[str, Any], path: Path | None, tokenizer: Any, sampling: Sampling, where: str
) -> Tensor:
    """Cut windows [samples, sequence_length] from a text, given as for ``read_texts``; shuffle a file's documents."""

    def texts() -> Iterator[str]:
        return without_repetitions(read_texts(source, path, source["text_field"], sampling.seed, where))

    order = None if path is None else places_in_random_order(sum(1 for _ in texts()), sampling.seed)
    return sample_windows(texts(), tokenizer, sampling, f"{where} {path or source['dataset']}", order)


# A text of a mixture: its settings and path as in ``read_windows``, and the number of its windows.
Source = tuple[Mapping[str, Any], Path | None, int]


def read_mixture(
    sources: Sequence[Source], tokenizer: Any, sampling: Sampling, apart: Sequence[bool], where: str
) -> Tensor:
    """Cut windows from several texts, from each as ``read_windows`` does, and interleave them; ``sampling`` is that of
    all windows, and ``apart`` tells for each window whether it will be kept apart from the others (``interleaved``).
    """
    left = [
        iter(read_windows(settings, path, tokenizer, replace(sampling, samples=count), where))
        for settings, path, count in sources
    ]
    order = interleaved([count for _, _, count in sources], apart, sampling.seed)
    return torch.stack([next(left[text]) for text in order])


def interleaved(counts: Sequence[int], apart: Sequence[bool], seed: int) -> list[int]:
    """The number of the text that each window is from, in the order of the windows.

    Stratified: the k-th of a text's ``count`` windows gets the position (k + u) / count, with u uniform in [0, 1), and
    windows are sorted by position. Every run of windows then has each text in about its share, without a period that
    could coincide with shards. Windows that will be kept ``apart`` are dealt first, and the others after them, so that
    both groups have the texts in their shares. Counts are off by less than 1 + the number of texts, in what is kept
    apart and in any first or last part of the others.
    """
    generator = torch.Generator().manual_seed(seed)
    places = [
        (torch.rand(count, generator=generator, dtype=torch.float64) + torch.arange(count)) / count for count in counts
    ]
    texts = [text for text, count in enumerate(counts) for _ in range(count)]
    dealt = torch.cat(places).argsort(stable=True).tolist()
    windows = sorted(range(len(apart)), key=lambda window: not apart[window])
    text_of = {window: texts[number] for window, number in zip(windows, dealt, strict=True)}
    return [text_of[window] for window in range(len(apart))]


def sample_windows(
    texts: Iterable[str], tokenizer: Any, sampling: Sampling, where: str, order: Sequence[int] | None = None
) -> Tensor:
    """Cut one random window from each of so many documents that are long enough, so that no two of these windows have
    text of the same document. ``order`` gives each document's place in the order of use; without it,
    they are used as they come, and no more are read than are needed.

    Raises:
        UserError: if there are too few such documents.
    """
    body, bos = sampling.body(tokenizer), sampling.bos(tokenizer)
    chosen: list[tuple[int, list[int]]] = []  # a heap, of which the last in order is the first; places are negated
    longest = 0
    for number, text in enumerate(texts):
        place = number if order is None else order[number]
        if len(chosen) == sampling.samples and place > -chosen[0][0]:
            if order is None:
                break
            continue
        ids = plain_ids(tokenizer, text)
        longest = max(longest, len(ids))
        if len(ids) >= body:
            (heappush if len(chosen) < sampling.samples else heapreplace)(chosen, (-place, ids))
    if len(chosen) < sampling.samples:
        raise _too_few(where, tokenizer, sampling, len(chosen), longest)
    generator = torch.Generator().manual_seed(sampling.seed)
    rows = []
    for _, ids in sorted(chosen, reverse=True):
        start = int(torch.randint(len(ids) - body + 1, (), generator=generator))
        rows.append(bos + ids[start : start + body])
    return torch.tensor(rows, dtype=torch.int64)


def without_repetitions(texts: Iterable[str]) -> Iterator[str]:
    """Leave out each text that has come before."""
    seen: set[int] = set()
    for text in texts:
        if (key := hash(text)) not in seen:
            seen.add(key)
            yield text


def places_in_random_order(documents: int, seed: int) -> list[int]:
    """For each document, its place in an order that depends only on their number and the seed."""
    order: list[int] = torch.randperm(documents, generator=torch.Generator().manual_seed(seed)).argsort().tolist()
    return order


def save_windows(input_ids_ST: Tensor, folder: Path) -> None:
    """Save the exact windows in an artifact, finished or not; readers of earlier ones aren't disturbed."""
    save_tensors({INPUT_IDS: input_ids_ST}, folder / WINDOWS)


def load_windows(folder: Path) -> Tensor:
    """The windows that ``save_windows`` saved, int64 [samples, sequence_length]."""
    windows_ST: Tensor = load_file(folder / WINDOWS)[INPUT_IDS]
    return windows_ST


def check_length(beginning: Beginning[str], tokenizer: Any, sampling: Sampling, where: str) -> None:
    """Refuse a source with too few documents for ``read_windows``, as far as its beginning tells."""
    found, longest, tokenized = 0, 0, 0
    for text in sorted(without_repetitions(beginning.records), key=lambda text: -len(text)):
        tokens = len(plain_ids(tokenizer, text[:TOKENIZED_CHARACTERS]))
        found += tokens >= sampling.body(tokenizer)
        longest, tokenized = max(longest, tokens), tokenized + len(text)
        if found == sampling.samples or tokenized > TOKENIZED_CHARACTERS:
            return
    if beginning.is_all:
        raise _too_few(where, tokenizer, sampling, found, longest)


def _too_few(where: str, tokenizer: Any, sampling: Sampling, found: int, longest: int) -> UserError:
    return UserError(
        f"{where}: {sampling.samples} windows need as many different documents of at least {sampling.body(tokenizer)} "
        f"tokens by the tokenizer of {tokenizer.name_or_path}, but it has {found} (the longest document has {longest} "
        "tokens); use more text, fewer windows, or a smaller sequence_length. A plain-text file is one document"
    )
