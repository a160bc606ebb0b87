"""Instruction pairs -> tokens -> packed rows.

A pair is ``[BOS] prompt response EOS``, with loss only on response and EOS. Several pairs share a row; the positions of
each restart at 0, from which transformers builds an attention mask that keeps each pair to itself.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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
from hfprune_dist.data.tokenizer import bos_id, plain_ids
from hfprune_dist.errors import UserError

# Alpaca's template for instructions without an input.
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
# The most pairs that are tokenized before a sweep begins, to check that one can be trained on: a second's work.
PAIRS_TO_TRY = 4096
# The tensors of a packed row.
ROW = ("input_ids", "position_ids", "labels")
PACKING_BUFFER = 8192  # pairs that are packed together: enough to fill rows well, few enough to keep them mixed


@dataclass(frozen=True)
class Pair:
    """The tokens of one instruction and its response; the first ``prompt_length`` of them carry no loss."""

    input_ids_T: NDArray[np.int32]
    prompt_length: int


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
    if not answered:
        return []
    prompts, wholes = (plain_ids(tokenizer, list(column)) for column in zip(*answered, strict=True))
    return [_pair(prompt, whole, bos, eos, sequence_length) for prompt, whole in zip(prompts, wholes, strict=True)]


def _pair(prompt: list[int], whole: list[int], bos: int | None, eos: int, sequence_length: int) -> Pair | None:
    begin = [] if bos is None else [bos]
    common = next((place for place, ids in enumerate(zip(prompt, whole, strict=False)) if ids[0] != ids[1]), None)
    prompt_length = len(begin) + (min(len(prompt), len(whole)) if common is None else common)
    input_ids = [*begin, *whole, eos][:sequence_length]
    if not whole or prompt_length >= len(input_ids):
        return None
    return Pair(np.asarray(input_ids, dtype=np.int32), prompt_length)


def check_pairs(beginning: Beginning, tokenizer: Any, sequence_length: int, where: str) -> None:
    """Check instructions and responses as ``require_trainable`` does, if there are at most ``PAIRS_TO_TRY``."""
    if beginning.is_all and len(beginning.texts) <= PAIRS_TO_TRY:
        pairs = [(prompt_for(instruction), response) for instruction, response in beginning.texts]
        require_trainable(encode_pairs(tokenizer, pairs, sequence_length), sequence_length, where)


def require_trainable(encoded: Sequence[Pair | None], sequence_length: int, where: str) -> None:
    """Refuse pairs of which none can be trained on."""
    if not any(encoded):
        raise UserError(
            f"{where}: none of {len(encoded)} pairs has a response token within recovery.sequence_length "
            f"{sequence_length}: responses are empty, or begin later, behind the template and the instruction; give "
            "other pairs, or raise it"
        )


def assign_rows(lengths: Sequence[int], sequence_length: int, seed: int) -> list[list[int]]:
    """The numbers of the pairs that share each row, given their ``lengths``: best-fit-decreasing inside buffers of
    shuffled pairs.
    """
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), PACKING_BUFFER):
        spaces: list[tuple[int, int]] = []  # (free tokens, row), ascending
        for pair in sorted(order[start : start + PACKING_BUFFER], key=lambda pair: -lengths[pair]):
            place = bisect.bisect_left(spaces, (lengths[pair], 0))
            free, row = spaces.pop(place) if place < len(spaces) else (sequence_length, len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(pair)
            bisect.insort(spaces, (free - lengths[pair], row))
    return rows


def save_rows(
    file: Path, encoded: Sequence[Pair | None], sequence_length: int, pad: int, seed: int, *, shares: bool = True
) -> None:
    """Pack the usable pairs (at least one) into rows and write them; the file appears whole or not at all.

    Labels are not shifted. Padding is a sequence of its own at the row's end, without loss.

    Args:
        pad: the token after a row's pairs.
        seed: of the order of the pairs.
        shares: whether pairs may share a row; otherwise each has a row to itself.
    """
    pairs = [pair for pair in encoded if pair is not None]
    lengths = [len(pair.input_ids_T) for pair in pairs]
    rows = assign_rows(lengths, sequence_length, seed) if shares else [[pair] for pair in range(len(pairs))]
    input_ids_RT = np.full((len(rows), sequence_length), pad, dtype=np.int32)
    labels_RT = np.full_like(input_ids_RT, IGNORED)
    position_ids_RT = np.empty_like(input_ids_RT)
    for row, members in enumerate(rows):
        start = 0
        for pair in (pairs[member] for member in members):
            end = start + len(pair.input_ids_T)
            input_ids_RT[row, start:end] = pair.input_ids_T
            labels_RT[row, start + pair.prompt_length : end] = pair.input_ids_T[pair.prompt_length :]
            position_ids_RT[row, start:end] = np.arange(end - start)
            start = end
        position_ids_RT[row, start:] = np.arange(sequence_length - start)
    counts = {
        "pairs": len(pairs),
        "dropped_pairs": len(encoded) - len(pairs),
        "rows": len(rows),
        "tokens": sum(lengths),
        "trained_tokens": sum(lengths) - sum(pair.prompt_length for pair in pairs),
    }
    arrays = zip(ROW, (input_ids_RT, position_ids_RT, labels_RT), strict=True)
    save_tensors({name: torch.from_numpy(array) for name, array in arrays}, file, {"counts": json.dumps(counts)})


class PackedRows:
    """The rows that ``save_rows`` wrote: number -> the tensors of ``ROW``, int64 [sequence_length].

    Attributes:
        counts: numbers of pairs that are trained on, of those without a response token inside sequence_length, of
            rows, of tokens without padding, and of those with a loss.
    """

    def __init__(self, file: Path) -> None:
        self._stream = safe_open(file, framework="pt")
        self.counts: dict[str, int] = json.loads(read_texts(file)["counts"])

    def __call__(self, row: int) -> dict[str, Tensor]:
        return {name: self._stream.get_slice(name)[row].long() for name in ROW}
