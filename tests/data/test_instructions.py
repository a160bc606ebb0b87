"""The template of instructions, the boundaries of the loss, and packing."""

from __future__ import annotations

import random

import torch
from tiny import tiny_model, tiny_tokenizer

from hfprune_dist.data.instructions import (
    PackedRows,
    assign_rows,
    encode_pairs,
    fill_rows,
    prompt_for,
    read_counts,
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


def test_prompt_is_alpacas_template():
    assert prompt_for("Add {1} and 2.") == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        "\n\n### Instruction:\nAdd {1} and 2.\n\n### Response:\n"
    )


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


def test_where_pairs_would_see_each_other_each_has_a_row_to_itself(tmp_path):
    encoded = encode([("a", "b"), ("c", ""), ("d", "ef")])
    counts = save_rows(tmp_path / "rows.safetensors", encoded, 12, EOS, 0, shares=False)
    rows = PackedRows(tmp_path / "rows.safetensors")
    assert (counts.pairs, counts.rows) == (2, 2)
    for number, pair in enumerate(pair for pair in encoded if pair is not None):
        length = len(pair.input_ids_T)
        assert rows(number)["input_ids"].tolist() == [*pair.input_ids_T, *[EOS] * (12 - length)]
        assert (rows(number)["labels"] != IGNORED).sum() == length - pair.prompt_length


def test_rows_restart_positions_and_train_responses_only():
    pairs = encode([("ab", "c"), ("d", "ef")])
    rows = fill_rows(pairs, [[0, 1]], 12, pad=EOS)
    a, b, c, d, e, f = (ids[0] for ids in tokenize(list("abcdef")))
    assert rows["input_ids"].tolist() == [[BOS, a, b, c, EOS, BOS, d, e, f, EOS, EOS, EOS]]
    assert rows["position_ids"].tolist() == [[0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]]
    ignored = IGNORED
    assert rows["labels"].tolist() == [
        [ignored, ignored, ignored, c, EOS, ignored, ignored, e, f, EOS, ignored, ignored]
    ]


def test_attention_does_not_cross_pairs():
    """A packed row's logits equal those of each pair on its own."""
    pairs = encode([("ask one\n", "tell"), ("a\n", "b"), ("third question\n", "and its answer")])
    rows = fill_rows(pairs, [[0, 1, 2]], 60, pad=EOS)
    model = tiny_model()
    model.config.use_cache = False
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        packed_BTV = model(input_ids=rows["input_ids"].long(), position_ids=rows["position_ids"].long()).logits
        start = 0
        for pair in pairs:
            alone_BTV = model(input_ids=torch.from_numpy(pair.input_ids_T).long()[None]).logits
            end = start + alone_BTV.shape[1]
            torch.testing.assert_close(packed_BTV[:, start:end], alone_BTV, rtol=1e-4, atol=1e-4)
            start = end
    assert packed_BTV.isfinite().all()


def test_saved_rows_and_their_counts(tmp_path):
    encoded = [*encode([("ab", "c"), ("d", "ef")], sequence_length=8), None]
    counts = save_rows(tmp_path / "rows.safetensors", encoded, 8, EOS, 0)
    assert read_counts(tmp_path / "rows.safetensors") == counts
    assert (counts.pairs, counts.dropped_pairs, counts.rows) == (2, 1, 2)
    assert (counts.tokens, counts.trained_tokens) == (10, 5)
    assert counts.packing_efficiency == 10 / 16
    assert [file.name for file in tmp_path.iterdir()] == ["rows.safetensors"]
