"""The templates of instructions and chats, the boundaries of the loss, and packing."""

from __future__ import annotations

import json
import random

import pytest
from tiny import tiny_tokenizer

from hfprune_dist.config.training import TrainingText
from hfprune_dist.data.examples import Example, prompt_for, read_examples
from hfprune_dist.data.instructions import PackedRows, assign_rows, encode, questions, save_rows
from hfprune_dist.data.schedule import IGNORED
from hfprune_dist.errors import UserError

BOS, EOS = 1, 2


def tokenize(texts: list[str]) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def encode_pairs(texts, sequence_length=64, bos=BOS, tokenize=tokenize):
    """Encode pairs as with a tokenizer of these special tokens."""

    def tokenizer(texts, *, add_special_tokens=True, **_options):
        start = [] if bos is None or not add_special_tokens else [bos]
        ids = [start + of_text for of_text in tokenize([texts] if isinstance(texts, str) else texts)]
        return {"input_ids": ids[0] if isinstance(texts, str) else ids}

    tokenizer.eos_token_id = EOS
    return encode(tokenizer, [Example("here", prompt, response) for prompt, response in texts], sequence_length)


def test_pair_is_bos_prompt_response_eos():
    (pair,) = encode_pairs([("ask\n", "tell")])
    assert pair.input_ids_T.tolist() == [BOS, *tokenize(["ask\ntell"])[0], EOS]
    assert pair.input_ids_T[pair.trained_T].tolist() == [*tokenize(["tell"])[0], EOS]


def test_a_token_that_straddles_the_boundary_is_trained():
    def merging(texts):
        return [[ord(letter) for letter in text.replace("\n\n", "\r")] for text in texts]

    (pair,) = encode_pairs([("ask\n", "\ntell")], 64, None, merging)
    assert pair.trained_T.tolist() == [False] * 3 + [True] * 6


def test_long_pairs_are_cut_and_pairs_without_response_dropped():
    pairs = [("ask\n", "x" * 100), ("y" * 100, "tell"), ("ask\n", " \n")]
    cut, no_room, empty = encode_pairs(pairs, sequence_length=16)
    assert len(cut.input_ids_T) == 16 and cut.input_ids_T[-1] != EOS
    assert no_room is empty is None


@pytest.mark.parametrize("bos", [None, BOS])
def test_an_empty_document_is_dropped(bos):
    """It would teach a model to end at once."""
    assert [piece is None for piece in encode_pairs([("", ""), ("", " \n"), ("", "x")], bos=bos)] == [True, True, False]


@pytest.mark.parametrize("bos", [None, BOS])
def test_long_documents_are_divided_into_pieces_with_loss_on_all_of_them(bos):
    pieces = encode_pairs([("", "x" * 40)], 16, bos)
    start, ids = [] if bos is None else [bos], [*tokenize(["x" * 40])[0], EOS]
    assert [*(token for piece in pieces for token in piece.input_ids_T[len(start) :])] == ids
    assert len(pieces) > 2 and all(piece.trained_T.all() and len(piece.input_ids_T) <= 16 for piece in pieces)
    assert all(piece.input_ids_T[: len(start)].tolist() == start for piece in pieces)


def test_packing_places_every_pair_once_and_fills_rows_well():
    generator = random.Random(0)
    lengths = [generator.randint(5, 100) for _ in range(3000)]
    rows = assign_rows(lengths, 128, seed=0)
    assert sorted(pair for row in rows for pair in row) == list(range(3000))
    assert max(sum(lengths[pair] for pair in row) for row in rows) <= 128
    assert sum(lengths) / (len(rows) * 128) > 0.95
    assert rows == assign_rows(lengths, 128, seed=0)
    assert rows != assign_rows(lengths, 128, seed=1)


def test_rows_restart_positions_and_train_responses_only(tmp_path):
    encoded = [*encode_pairs([("ab", "c"), ("d", "ef")]), None]
    a, b, c, d, e, f = (ids[0] for ids in tokenize(list("abcdef")))
    one, other = [BOS, a, b, c, EOS], [BOS, d, e, f, EOS]
    for shares, expected in ((True, [one + other]), (False, [one, other])):
        file = tmp_path / f"{shares}.safetensors"
        save_rows(file, encoded, 12, EOS, 0, shares=shares)
        rows = PackedRows(file)
        numbers = {"pairs": 2, "dropped_pairs": 1, "tokens": 10, "trained_tokens": 5}
        assert rows.counts == {**numbers, "rows": len(expected)}
        found = [rows(number) for number in range(len(expected))]
        assert [row["input_ids"].tolist() for row in found] in (
            [(ids + [EOS] * 12)[:12] for ids in expected],
            [(other + one + [EOS] * 12)[:12]],
        )
        trained = [row["input_ids"][row["labels"] != IGNORED].tolist() for row in found]
        assert sorted(token for ids in trained for token in ids) == sorted([c, EOS, e, f, EOS])
        assert all((row["labels"] == row["input_ids"])[row["labels"] != IGNORED].all() for row in found)
        starts = [0, 1, 2, 3, 4]
        padding = range(12 - 5 * (1 + shares))
        assert all(row["position_ids"].tolist() == [*starts * (1 + shares), *padding] for row in found)


TURN = "<{{ m.role }}>{{ m.content }}"
PLAIN = "{% for m in messages %}" + TURN + ";{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}<assistant>{% generation %}{{ m.content }};"
    "{% endgeneration %}{% else %}" + TURN + ";{% endif %}{% endfor %}"
)
# As those of Qwen3 and Mistral do, these write the last turn of an assistant, or of a user, in their own way.
OF_THE_LAST = PLAIN.replace("{{ m.content }}", "{{ '!' if loop.last and m.role == 'assistant' }}{{ m.content }}")
OF_A_QUESTION = PLAIN.replace("{{ m.content }}", "{{ '!' if loop.revindex == 1 and m.role == 'user' }}{{ m.content }}")
TURNS = [("system", "s"), ("user", "ab"), ("assistant", "cd"), ("user", "e"), ("assistant", "f")]
MESSAGES = [{"role": role, "content": content} for role, content in TURNS]


def examples_in(folder, *records, **fields):
    file = folder / "data.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    return list(read_examples(TrainingText().model_dump() | fields, file, 0))


@pytest.mark.parametrize(("template", "said"), [(OF_THE_LAST, "cd;!f;"), (OF_A_QUESTION, "cd;f;")])
def test_turns_that_a_template_writes_otherwise_once_others_follow_are_trained(tmp_path, template, said):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    (chat,) = encode(tokenizer, examples_in(tmp_path, {"messages": MESSAGES}), 256)
    assert tokenizer.decode(chat.input_ids_T[chat.trained_T]) == said


@pytest.mark.parametrize("template", [PLAIN, MARKED], ids=["by what turns add", "by the template's marks"])
def test_the_assistants_turns_of_a_chat_are_trained(tmp_path, template):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    examples = examples_in(tmp_path, {"messages": MESSAGES}, {"messages": MESSAGES[:2]})
    chat, unanswered = encode(tokenizer, examples, 256)
    text = "<system>s;<user>ab;<assistant>cd;<user>e;<assistant>f;"
    assert chat.input_ids_T.tolist() == tokenize([text])[0]
    assert chat.input_ids_T[chat.trained_T].tolist() == [*tokenize(["cd;"])[0], *tokenize(["f;"])[0]]
    assert unanswered is None
    first_turn = len(tokenize(["<system>s;<user>ab;<assistant>cd;"])[0])
    (cut,) = encode(tokenizer, examples[:1], first_turn + 1)
    assert cut.input_ids_T[cut.trained_T].tolist() == tokenize(["cd;"])[0]


def test_where_a_model_answers_nothing_after_the_question_is_read(tmp_path):
    calls, tool = {"role": "assistant", "content": None}, {"role": "tool", "content": [1]}
    records = {"messages": [*MESSAGES[:2], calls, tool]}, {"instruction": "ask", "response": 7}, {"messages": [calls]}
    tokenizer, examples = tiny_tokenizer(), examples_in(tmp_path, *records, answers="dense")
    tokenizer.chat_template = PLAIN
    chat, pair, nothing = questions(tokenizer, examples, 256)
    assert tokenizer.decode(chat) == "<system>s;<user>ab;<assistant>" and nothing is None
    assert pair == [BOS, *tokenize([prompt_for("ask")])[0]]
    assert questions(tokenizer, examples, len(pair) - 1) == [chat, None, None]
    with pytest.raises(UserError, match=r"nor an instruction, in 'instruction' \(.*; the record has prompt$") as caught:
        examples_in(tmp_path, {"prompt": "ask"}, answers="dense")
    assert "response" not in str(caught.value)


def test_an_input_goes_into_alpacas_template(tmp_path):
    pair = {"instruction": "ask", "response": "tell"}
    plain, empty, about = examples_in(tmp_path, pair, {**pair, "input": ""}, {**pair, "input": "that"})
    assert plain.prompt == empty.prompt and "Input" not in plain.prompt
    assert about.prompt.endswith("### Instruction:\nask\n\n### Input:\nthat\n\n### Response:\n")
    fields = {"instruction_field": "input", "response_field": "output"}
    (own,) = examples_in(tmp_path, {"input": "ask", "output": "tell"}, **fields)
    assert (own.prompt, own.response) == (plain.prompt, plain.response)


@pytest.mark.parametrize(
    ("record", "parts"),
    [
        ({"prompt": "ask"}, ["data.jsonl:1", "neither a chat", "instruction_field", "the record has prompt"]),
        ({"messages": "ask"}, ["data.jsonl:1", "'messages' holds 'ask'", "role"]),
        ({"messages": [{"role": "user"}]}, ["data.jsonl:1, message 1", "no text in field 'content'"]),
        ({"messages": MESSAGES}, ["data.jsonl:1", "no chat template", "chat_template.jinja"]),
    ],
)
def test_other_records_are_refused(tmp_path, record, parts):
    with pytest.raises(UserError) as caught:
        encode(tiny_tokenizer(), examples_in(tmp_path, record), 64)
    assert all(part in str(caught.value) for part in parts), caught.value
