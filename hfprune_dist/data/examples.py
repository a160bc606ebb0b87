"""What recovery trains on: each record of its data is a chat, an instruction with its response, or a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from hfprune_dist.data.text import read_records, text_in
from hfprune_dist.errors import UserError

# Fields of a chat, and of what an instruction is about, as in Alpaca's data.
MESSAGES, INPUT = "messages", "input"
# Alpaca's templates.
_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
_PROMPT_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
    "response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)


class Example(NamedTuple):
    """A record to train on: the assistant's turns of ``messages`` (dictionaries with ``role`` and ``content``); if
    there are none, the ``response`` that follows a ``prompt``, or a document, without one. ``where`` tells its place,
    for messages.
    """

    where: str
    prompt: str = ""
    response: str = ""
    messages: tuple[Mapping[str, str], ...] = ()


def prompt_for(instruction: str, about: str = "") -> str:
    """The prompt for an instruction, and for the input that it is about, if any; the response follows it."""
    template = _PROMPT_WITH_INPUT if about.strip() else _PROMPT
    return template.format_map({"instruction": instruction, "input": about})


def read_examples(source: Mapping[str, Any], path: Path | None, seed: int) -> Iterator[Example]:
    """Yield the examples of a source, given as for ``read_records`` with the settings of recovery; refuse a record that
    is neither chat, pair nor text. Where the dense model is to answer, they have no response, and a chat ends before
    its first one.
    """
    if source["text"] == "documents":
        field = source["text_field"]
        for where, record in read_records(source, path, [field], seed, "recovery"):
            yield Example(where, response=text_in(record, field, f"{where} (see text_field)"))
        return
    asks = source["answers"] == "dense"
    fields = {f"recovery.{name}": source[name] for name in ("instruction_field", "response_field")[: 1 if asks else 2]}
    read = [*fields.values()]
    for where, record in read_records(source, path, [*read, MESSAGES, INPUT], seed, "recovery"):
        if record.get(MESSAGES) is not None and MESSAGES not in read:
            yield Example(where, messages=_messages_in(record, where, asks))
        elif {*read} <= record.keys():
            instruction, response, *_ = *(text_in(record, field, where) for field in read), ""
            about = text_in(record, INPUT, where) if record.get(INPUT) is not None and INPUT not in read else ""
            yield Example(where, prompt_for(instruction, about), response)
        else:
            raise UserError(
                f"{where}: neither a chat, in field {MESSAGES!r}, nor {'an instruction' if asks else 'a pair'}, in "
                f"{' and '.join(map(repr, read))} (change {' and '.join(fields)} to your fields' names); "
                f"the record has {', '.join(record):.300}"
            )


def _messages_in(record: Mapping[str, Any], where: str, asks: bool) -> tuple[Mapping[str, str], ...]:
    messages = record[MESSAGES]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError(
            f"{where}: field {MESSAGES!r} holds {messages!r:.80}; a chat is a list of objects with a role and a content"
        )
    read = takewhile(lambda message: not asks or message.get("role") != "assistant", messages)
    numbered = [(f"{where}, message {number}", message) for number, message in enumerate(read, start=1)]
    return tuple(
        {field: text_in(message, field, place) for field in ("role", "content")} for place, message in numbered
    )
