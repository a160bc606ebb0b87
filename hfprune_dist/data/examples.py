"""What recovery trains on: each record of its data is a chat, an instruction with its response, or a document."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from hfprune_dist.data.text import read_records, text_in
from hfprune_dist.errors import UserError

# Fields of a chat; of what an instruction is about, as in Alpaca's data; and, if true, of a response without its end.
MESSAGES, INPUT, UNFINISHED = "messages", "input", "unfinished"
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
    for messages, and ``question`` what the prompt was made of; what is ``unfinished`` lacks its end.
    """

    where: str
    prompt: str = ""
    response: str = ""
    messages: tuple[Mapping[str, str], ...] = ()
    question: Mapping[str, str] = {}
    unfinished: bool = False

    def answered(self, answer: str, unfinished: bool) -> dict[str, Any]:
        """A record of it with another response or last turn, with the default names of fields."""
        messages = [*self.messages[:-1], {"role": "assistant", "content": answer}]
        record = {MESSAGES: messages} if self.messages else {**self.question, "response": answer}
        return record | {UNFINISHED: unfinished}


def prompt_for(instruction: str, about: str = "") -> str:
    """The prompt for an instruction, and for the input that it is about, if any; the response follows it."""
    template = _PROMPT_WITH_INPUT if about.strip() else _PROMPT
    return template.format_map({"instruction": instruction, "input": about})


def read_examples(source: Mapping[str, Any], path: Path | None, seed: int) -> Iterator[Example]:
    """Yield the examples of a source, given as for ``read_records`` with the settings of recovery; refuse a record that
    is neither chat, pair nor text. Where the dense model is to answer, a word stands for the response, and a chat ends
    there.
    """
    if source["text"] == "documents":
        field = source["text_field"]
        records = read_records(source, path, [field], seed, "recovery")
        yield from (Example(where, response=text_in(record, field, where)) for where, record in records)
        return
    pair, asks = [source["instruction_field"], source["response_field"]], source["answers"] == "dense"
    for where, record in read_records(source, path, [*pair, MESSAGES, INPUT], seed, "recovery"):
        record = {**record, pair[1]: "answer"} if asks else record
        unfinished = record.get(UNFINISHED) is True
        if record.get(MESSAGES) is not None and MESSAGES not in pair:
            messages = _messages_in(record, where)
            asked = takewhile(lambda message: message["role"] != "assistant", messages)
            messages = (*asked, {"role": "assistant", "content": "answer"}) if asks else messages
            yield Example(where, messages=messages, unfinished=unfinished)
        elif {*pair} <= record.keys():
            instruction, response = (text_in(record, field, where) for field in pair)
            about = text_in(record, INPUT, where) if record.get(INPUT) is not None and INPUT not in pair else ""
            question = {"instruction": instruction, INPUT: about}
            yield Example(where, prompt_for(instruction, about), response, question=question, unfinished=unfinished)
        else:
            raise UserError(
                f"{where}: neither a chat, in field {MESSAGES!r}, nor a pair, in {pair[0]!r} and {pair[1]!r} (change "
                "recovery.instruction_field and recovery.response_field to your fields' names); "
                f"the record has {', '.join(record):.300}"
            )


def _messages_in(record: Mapping[str, Any], where: str) -> tuple[Mapping[str, str], ...]:
    messages = record[MESSAGES]
    if not isinstance(messages, list) or not messages or not all(isinstance(message, dict) for message in messages):
        raise UserError(
            f"{where}: field {MESSAGES!r} holds {messages!r:.80}; a chat is a list of objects with a role and a content"
        )
    numbered = [(f"{where}, message {number}", message) for number, message in enumerate(messages, start=1)]
    return tuple(
        {field: text_in(message, field, place) for field in ("role", "content")} for place, message in numbered
    )
