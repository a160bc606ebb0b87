"""Examples -> tokens -> packed rows.

A pair is ``[BOS] prompt response EOS``, with loss only on response and EOS; a chat is what the tokenizer's chat
template makes of it, with loss only on the assistant's turns; a document is ``[BOS] text EOS``, and a long one several
such pieces, with loss on all of it. Several share a row; the positions of each restart at 0, from which transformers
builds an attention mask that keeps each to itself.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import safe_open
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import header_texts, save_tensors
from hfprune_dist.data.examples import Example
from hfprune_dist.data.schedule import IGNORED
from hfprune_dist.data.text import Beginning
from hfprune_dist.data.tokenizer import bos_ids, plain_ids
from hfprune_dist.errors import UserError

# Examples that are tokenized at once, and the first ones that are before a sweep begins.
EXAMPLES_AT_ONCE, EXAMPLES_TO_TRY = 2000, 1024
# The tensors of a packed row.
ROW = ("input_ids", "position_ids", "labels")
PACKING_BUFFER = 8192  # examples that are packed together: enough to fill rows well, few enough to keep them mixed
OTHER = "\u2063"  # in place of what an assistant says, to see where it is in a chat
# What a chat template has around what the assistant says, if it tells.
_GENERATION = re.compile(r"{%-?\s*generation\b")


@dataclass(frozen=True)
class Encoded:
    """The tokens of an example, and which of them are trained on, bool."""

    input_ids_T: NDArray[np.int32]
    trained_T: NDArray[np.bool_]


def encode(tokenizer: Any, examples: Sequence[Example], sequence_length: int) -> list[Encoded | None]:
    """Tokenize examples (at least one), cut to ``sequence_length``, but documents divided into pieces of this length;
    None for one without a token left to train on. A chat that the tokenizer has no template for is refused.

    Prompt and response are tokenized as one text, as a reader of the template would: the response begins with the first
    token that holds one of its characters.
    """
    bos, eos = bos_ids(tokenizer), tokenizer.eos_token_id
    prompts = plain_ids(tokenizer, [example.prompt for example in examples])
    wholes = plain_ids(tokenizer, [example.prompt + example.response for example in examples])
    encoded: list[Encoded | None] = []
    for example, prompt, whole in zip(examples, prompts, wholes, strict=True):
        if not example.prompt and not example.messages:
            ids, body = [*whole, eos] if example.response.strip() else [], sequence_length - len(bos)
            pieces = [[*bos, *ids[first : first + body]] for first in range(0, len(ids), body)]
            of_piece = (np.asarray(piece, dtype=np.int32) for piece in pieces if len(piece) > len(bos) + 1)
            encoded += [Encoded(ids_T, np.ones(len(ids_T), dtype=np.bool_)) for ids_T in of_piece] or [None]
            continue
        ids = [*bos, *whole, eos]
        untrained = len(ids) - 1 - len(whole) + _in_common(prompt, whole)
        trained = [bool(example.response.strip()) and place >= untrained for place in range(len(ids))]
        if example.messages:
            with _rendering(tokenizer, example):
                ids, trained = _encode_chat(tokenizer, example)
        trained_T = np.asarray(trained[:sequence_length], dtype=np.bool_)
        kept = Encoded(np.asarray(ids[:sequence_length], dtype=np.int32), trained_T)
        encoded.append(kept if trained_T[1:].any() else None)
    return encoded


def questions(tokenizer: Any, examples: Sequence[Example], longest: int) -> list[list[int] | None]:
    """The tokens after which a model is to respond to examples (at least one): of a chat, all up to where its template
    has the assistant begin. None where there are more than ``longest``, or none.
    """
    prompts = plain_ids(tokenizer, [example.prompt for example in examples])
    asked = [[*bos_ids(tokenizer), *ids] if ids else [] for ids in prompts]
    for number, example in enumerate(examples):
        if example.messages:
            with _rendering(tokenizer, example):
                asked[number] = _chat_ids(tokenizer, example.messages, next_turn=True)
    return [ids if 0 < len(ids) <= longest else None for ids in asked]


@contextmanager
def _rendering(tokenizer: Any, example: Example) -> Iterator[None]:
    """Refuse a chat that the tokenizer has no template for, or one that can't render it."""
    if not tokenizer.chat_template:
        raise UserError(
            f"{example.where}: a chat, and the tokenizer of {tokenizer.name_or_path} has no chat template; put one "
            "beside it (chat_template.jinja, for example that of the model's instruct version), or give pairs"
        )
    try:
        yield
    except Exception as error:  # a template is a program: anything can happen
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{example.where}: the tokenizer's chat template can't render this chat: {reason}") from None


def _chat_ids(tokenizer: Any, messages: Sequence[Mapping[str, str]], *, next_turn: bool = False) -> list[int]:
    text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=next_turn)
    return plain_ids(tokenizer, text)


def _encode_chat(tokenizer: Any, example: Example) -> tuple[list[int], list[bool]]:
    """Train on what is between the template's marks; without marks, on an assistant's words and what ends its turn."""
    messages = example.messages
    if _GENERATION.search(tokenizer.get_chat_template()):
        options = {"return_dict": True, "return_assistant_tokens_mask": True}
        marked = tokenizer.apply_chat_template(list(messages), **options)
        return list(marked["input_ids"]), [bool(mark) for mark in marked["assistant_masks"]]
    whole = _chat_ids(tokenizer, messages)
    trained = [False] * len(whole)
    for number, message in enumerate(messages):
        if message["role"] == "assistant":
            # Templates may write a turn, or what is before it, otherwise once others follow.
            other = [*messages[:number], {**message, "content": OTHER}, *messages[number + 1 :]]
            other_ids, ends = _chat_ids(tokenizer, other), _chat_ids(tokenizer, messages[: number + 1])
            asked = _chat_ids(tokenizer, messages[:number], next_turn=True) if number else []
            is_beginning = bool(asked) and whole[: len(asked)] == asked
            begin = len(asked) if is_beginning else _in_common(other_ids, whole)
            behind = _in_common(other_ids[::-1], whole[::-1])
            end = max(min(len(whole) - behind + 1, len(whole)), _in_common(ends, whole))
            trained[begin:end] = [True] * (end - begin)
    return whole, trained


def _in_common(one: Sequence[int], other: Sequence[int]) -> int:
    """Number of tokens with which both begin."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (ours, theirs) in pairs if ours != theirs), min(len(one), len(other)))


def read_answers(file: Path) -> list[Encoded | None]:
    """The answers that a model gave (``stages.answers``), after what it was asked, token by token as they were."""
    encoded: list[Encoded | None] = []
    with file.open(encoding="utf-8") as lines:
        for record in map(json.loads, lines):
            ids_T = np.asarray([*record["prompt_ids"], *record["response_ids"]], dtype=np.int32)
            encoded.append(Encoded(ids_T, np.arange(len(ids_T)) >= len(record["prompt_ids"])))
    return encoded


def check_examples(
    beginning: Beginning[Example], tokenizer: Any, sequence_length: int, where: str, answer_tokens: int = 0
) -> None:
    """Check the first examples: that chats can be rendered and, if there are no others, that one can be trained on.

    Args:
        answer_tokens: the most that the dense model's answer takes; 0 if examples have responses.
    """
    work = questions if answer_tokens else encode
    found = work(tokenizer, beginning.records[:EXAMPLES_TO_TRY], sequence_length - answer_tokens)
    if beginning.is_all and len(found) == len(beginning.records):
        require_trainable(found, sequence_length, where)


def require_trainable(encoded: Sequence[object], sequence_length: int, where: str) -> None:
    """Refuse examples of which none can be trained on."""
    if not any(encoded):
        raise UserError(
            f"{where}: none of {len(encoded)} records has a response token within recovery.sequence_length "
            f"{sequence_length}: responses are empty, or begin later, after the template and the instruction (with "
            "answers dense, in its second half); give others, or raise it"
        )


def assign_rows(lengths: Sequence[int], sequence_length: int, seed: int) -> list[list[int]]:
    """The numbers of the examples that share each row: best-fit-decreasing inside buffers of shuffled ones."""
    order = torch.randperm(len(lengths), generator=torch.Generator().manual_seed(seed)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), PACKING_BUFFER):
        spaces: list[tuple[int, int]] = []  # (free tokens, row), ascending
        for number in sorted(order[start : start + PACKING_BUFFER], key=lambda number: -lengths[number]):
            place = bisect.bisect_left(spaces, (lengths[number], 0))
            free, row = spaces.pop(place) if place < len(spaces) else (sequence_length, len(rows))
            if row == len(rows):
                rows.append([])
            rows[row].append(number)
            bisect.insort(spaces, (free - lengths[number], row))
    return rows


def save_rows(
    file: Path, encoded: Sequence[Encoded | None], sequence_length: int, pad: int, seed: int, *, shares: bool = True
) -> None:
    """Pack the usable examples (at least one) into rows and write them; the file appears whole or not at all.

    Labels are not shifted. Padding is a sequence of its own at the row's end, without loss.

    Args:
        pad: the token after a row's examples.
        seed: of the order of the examples.
        shares: whether examples may share a row; otherwise each has a row to itself.
    """
    usable = [example for example in encoded if example is not None]
    lengths = [len(example.input_ids_T) for example in usable]
    rows = assign_rows(lengths, sequence_length, seed) if shares else [[number] for number in range(len(usable))]
    input_ids_RT = np.full((len(rows), sequence_length), pad, dtype=np.int32)
    labels_RT = np.full_like(input_ids_RT, IGNORED)
    position_ids_RT = np.empty_like(input_ids_RT)
    for row, members in enumerate(rows):
        start = 0
        for example in (usable[member] for member in members):
            end = start + len(example.input_ids_T)
            input_ids_RT[row, start:end] = example.input_ids_T
            labels_RT[row, start:end] = np.where(example.trained_T, example.input_ids_T, IGNORED)
            labels_RT[row, start] = IGNORED  # which nothing before it predicts
            position_ids_RT[row, start:end] = np.arange(end - start)
            start = end
        position_ids_RT[row, start:] = np.arange(sequence_length - start)
    counts = {
        "pairs": len(usable),
        "dropped_pairs": len(encoded) - len(usable),
        "rows": len(rows),
        "tokens": sum(lengths),
        "trained_tokens": int((labels_RT != IGNORED).sum()),
    }
    arrays = zip(ROW, (input_ids_RT, position_ids_RT, labels_RT), strict=True)
    save_tensors({name: torch.from_numpy(array) for name, array in arrays}, file, {"counts": json.dumps(counts)})


class PackedRows:
    """The rows that ``save_rows`` wrote: number -> the tensors of ``ROW``, int64 [sequence_length]; and ``counts`` of
    examples that are trained on, or lack a response token inside sequence_length, of rows, of tokens without padding,
    and of those with a loss.
    """

    def __init__(self, file: Path) -> None:
        self._stream = safe_open(file, framework="pt")
        self.counts: dict[str, int] = json.loads(header_texts(file)["counts"])

    def __call__(self, row: int) -> dict[str, Tensor]:
        return {name: self._stream.get_slice(name)[row].long() for name in ROW}
