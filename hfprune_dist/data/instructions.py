"""Instruction pairs -> tokens -> packed rows.

A pair is ``[BOS] prompt response EOS``, with loss only on response and EOS. Several pairs share a row; the positions of
each restart at 0, from which transformers builds an attention mask that keeps each pair to itself.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import read_texts, save_tensors
from hfprune_dist.data.schedule import IGNORED
from hfprune_dist.data.text import Beginning
from hfprune_dist.data.tokenizer import all_plain_ids, bos_id
from hfprune_dist.errors import UserError

# Alpaca's template for instructions without an input.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
# The most pairs that are tokenized before a sweep begins, to check that one can be trained on: a second's work.
PAIRS_TO_TRY = 4096
PACKING_BUFFER = 8192  # pairs that are packed together: enough to fill rows well, few enough to keep them mixed


@dataclass(frozen=True)
class Pair:
    """The tokens of one instruction and its response; the first ``prompt_length`` of them carry no loss."""

    input_ids_T: NDArray[np.int32]
    prompt_length: int


@dataclass(frozen=True)
class RowCounts:
    """Numbers of pairs, rows and tokens after packing.

    Attributes:
        pairs: pairs that are trained on.
        dropped_pairs: pairs without a response token inside sequence_length.
        rows: packed rows.
        tokens: tokens of all pairs, without padding.
        trained_tokens: tokens that carry loss.
        packing_efficiency: share of the rows' tokens that is not padding.
    """

    pairs: int
    dropped_pairs: int
    rows: int
    tokens: int
    trained_tokens: int
    packing_efficiency: float


def prompt_for(instruction: str) -> str:
    """The prompt for an instruction, which the response follows."""
    return PROMPT.format_map({"instruction": instruction})


def encode_pairs(tokenizer: Any, texts: Iterable[tuple[str, str]], sequence_length: int) -> list[Pair | None]:
    """Tokenize prompts and responses, cut to ``sequence_length``; None for a pair without a response token left.

    Prompt and response are tokenized as one text, as a reader of the template would: the response begins with the first
    token that holds one of its characters.
    """
    bos, eos = bos_id(tokenizer, add_bos_token=True), tokenizer.eos_token_id
    answered = [(prompt, prompt + response if response.strip() else "") for prompt, response in texts]
    prompts = all_plain_ids(tokenizer, [prompt for prompt, _ in answered])
    wholes = all_plain_ids(tokenizer, [whole for _, whole in answered])
    return [_pair(prompt, whole, bos, eos, sequence_length) for prompt, whole in zip(prompts, wholes, strict=True)]


def _pair(prompt: list[int], whole: list[int], bos: int | None, eos: int, sequence_length: int) -> Pair | None:
    begin = [] if bos is None else [bos]
    common = next((place for place, ids in enumerate(zip(prompt, whole, strict=False)) if ids[0] != ids[1]), None)
    prompt_length = len(begin) + (min(len(prompt), len(whole)) if common is None else common)
    input_ids = [*begin, *whole, eos][:sequence_length]
    if not whole or prompt_length >= len(input_ids):
        return None
    return Pair(np.asarray(input_ids, dtype=np.int32), prompt_length)


def require_trainable(beginning: Beginning, tokenizer: Any, sequence_length: int, where: str) -> None:
    """Refuse instructions and responses that leave nothing to train on, if there are at most ``PAIRS_TO_TRY``.

    Raises:
        UserError: the one that ``nothing_to_train_on`` makes.
    """
    if beginning.is_all and len(beginning.texts) <= PAIRS_TO_TRY:
        pairs = [(prompt_for(instruction), response) for instruction, response in beginning.texts]
        if not any(encode_pairs(tokenizer, pairs, sequence_length)):
            raise nothing_to_train_on(len(pairs), sequence_length, where)


def nothing_to_train_on(pairs: int, sequence_length: int, where: str) -> UserError:
    """The error to raise if none of so many pairs has a response token within ``sequence_length``."""
    return UserError(
        f"{where}: none of {pairs} pairs has a response token within recovery.sequence_length {sequence_length}: "
        "responses are empty, or begin later, behind the template and the instruction; give other pairs, or raise it"
    )


def assign_rows(lengths: Sequence[int], sequence_length: int, seed: int) -> list[list[int]]:
    """Decide which pairs share a row: best-fit-decreasing inside buffers of shuffled pairs.

    Args:
        lengths: tokens of each pair, at most ``sequence_length``.

    Returns:
        Indices of the pairs in each row.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    buffers = [order[start : start + PACKING_BUFFER] for start in range(0, len(order), PACKING_BUFFER)]
    return [row for buffer in buffers for row in _best_fit_decreasing(buffer, lengths, sequence_length)]


def _best_fit_decreasing(pairs: list[int], lengths: Sequence[int], sequence_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (free tokens, row), ascending
    for pair in sorted(pairs, key=lambda pair: -lengths[pair]):
        place = bisect.bisect_left(spaces, (lengths[pair], 0))
        free, row = spaces.pop(place) if place < len(spaces) else (sequence_length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(pair)
        bisect.insort(spaces, (free - lengths[pair], row))
    return rows


def fill_rows(
    pairs: Sequence[Pair], rows: Sequence[Sequence[int]], sequence_length: int, pad: int
) -> dict[str, Tensor]:
    """Lay pairs out in rows.

    Returns:
        ``input_ids``, ``position_ids`` and ``labels``, each int32 [rows, sequence_length]. Labels are not shifted.
        Padding is a sequence of its own at the row's end, without loss.
    """
    shape = (len(rows), sequence_length)
    input_ids_RT = np.full(shape, pad, dtype=np.int32)
    labels_RT = np.full(shape, IGNORED, dtype=np.int32)
    position_ids_RT = np.empty(shape, dtype=np.int32)
    for row, members in enumerate(rows):
        start = 0
        for pair in (pairs[member] for member in members):
            end = start + len(pair.input_ids_T)
            input_ids_RT[row, start:end] = pair.input_ids_T
            labels_RT[row, start + pair.prompt_length : end] = pair.input_ids_T[pair.prompt_length :]
            position_ids_RT[row, start:end] = np.arange(end - start)
            start = end
        position_ids_RT[row, start:] = np.arange(sequence_length - start)
    arrays = {"input_ids": input_ids_RT, "position_ids": position_ids_RT, "labels": labels_RT}
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def save_rows(
    file: Path, encoded: Sequence[Pair | None], sequence_length: int, pad: int, seed: int, *, shares: bool = True
) -> RowCounts:
    """Pack the usable pairs (at least one) into rows and write them; the file appears whole or not at all.

    Args:
        pad: the token after a row's pairs.
        seed: of the order of the pairs.
        shares: whether pairs may share a row; otherwise each has a row to itself.
    """
    pairs = [pair for pair in encoded if pair is not None]
    lengths = [len(pair.input_ids_T) for pair in pairs]
    rows = assign_rows(lengths, sequence_length, seed) if shares else [[pair] for pair in range(len(pairs))]
    counts = RowCounts(
        pairs=len(pairs),
        dropped_pairs=len(encoded) - len(pairs),
        rows=len(rows),
        tokens=sum(lengths),
        trained_tokens=sum(lengths) - sum(pair.prompt_length for pair in pairs),
        packing_efficiency=sum(lengths) / (len(rows) * sequence_length),
    )
    arrays = fill_rows(pairs, rows, sequence_length, pad)
    save_tensors(arrays, file, {"counts": json.dumps(asdict(counts), allow_nan=False)})
    return counts


def read_counts(file: Path) -> RowCounts:
    """The counts that ``save_rows`` stored in its file."""
    return RowCounts(**json.loads(read_texts(file)["counts"]))


class PackedRows:
    """The rows that ``save_rows`` wrote: number -> ``input_ids``, ``position_ids`` and ``labels``, int64."""

    def __init__(self, file: Path) -> None:
        self._stream = safe_open(file, framework="pt")

    def __call__(self, row: int) -> dict[str, Tensor]:
        return {name: self._stream.get_slice(name)[row].long() for name in ("input_ids", "position_ids", "labels")}
