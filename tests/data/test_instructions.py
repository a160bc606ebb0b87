"""The template of instructions, the boundaries of the loss, and packing."""

from __future__ import annotations

import random

from tiny import tiny_tokenizer

from hfprune_dist.data.instructions import (
    PackedRows,
    assign_rows,
    encode_pairs,
    save_rows,
)
from hfprune_dist.data.schedule import IGNORED

BOS, EOS = 1, 2


def tokenize(texts: list[str]) -> list[list[int]]:
    tokenizer = tiny_tokenizer()
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]


def encode(texts, sequence_length=64, bos=BOS, tokenize=tokenize):
    """Encode pairs as with a tokenizer of these special tokens."""

    def tokenizer(texts, **_options):
        return {"input_ids": tokenize(texts)}

    tokenizer.bos_token_id, tokenizer.eos_token_id = bos, EOS
    return encode_pairs(tokenizer, texts, sequence_length)


def test_pair_is_bos_prompt_response_eos():
    (pair,) = encode([("ask\n", "tell")])
    assert pair.input_ids_T.tolist() == [BOS, *tokenize(["ask\ntell"])[0], EOS]
    assert pair.input_ids_T[pair.prompt_length :].tolist() == [*tokenize(["tell"])[0], EOS]


def test_a_token_that_straddles_the_boundary_is_trained():
    def merging(texts):
        return [[ord(letter) for letter in text.replace("\n\n", "\r")] for text in texts]

    (pair,) = encode([("ask\n", "\ntell")], 64, None, merging)
    assert pair.prompt_length == 3


def test_long_pairs_are_cut_and_pairs_without_response_dropped():
    cut, no_room, empty = encode([("ask\n", "x" * 100), ("y" * 100, "tell"), ("ask\n", " \n")], sequence_length=16)
    assert len(cut.input_ids_T) == 16
    assert cut.input_ids_T[-1] != EOS
    assert no_room is None
    assert empty is None


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
    encoded = [*encode([("ab", "c"), ("d", "ef")]), None]
    a, b, c, d, e, f = (ids[0] for ids in tokenize(list("abcdef")))
    one, other = [BOS, a, b, c, EOS], [BOS, d, e, f, EOS]
    for shares, expected in ((True, [one + other]), (False, [one, other])):
        file = tmp_path / f"{shares}.safetensors"
        save_rows(file, encoded, 12, EOS, 0, shares=shares)
        rows = PackedRows(file)
        numbers = {"pairs": 2, "dropped_pairs": 1, "tokens": 10, "trained_tokens": 5}
        assert rows.counts == {**numbers, "rows": len(expected)}
        found = [rows(number) for number in range(len(expected))]
        assert [it["input_ids"].tolist() for it in found] in (
            [(it + [EOS] * 12)[:12] for it in expected],
            [(other + one + [EOS] * 12)[:12]],
        )
        trained = [it["input_ids"][it["labels"] != IGNORED].tolist() for it in found]
        assert sorted(token for it in trained for token in it) == sorted([c, EOS, e, f, EOS])
        assert all((it["labels"] == it["input_ids"])[it["labels"] != IGNORED].all() for it in found)
        starts = [0, 1, 2, 3, 4]
        padding = range(12 - 5 * (1 + shares))
        assert all(it["position_ids"].tolist() == [*starts * (1 + shares), *padding] for it in found)
