"""Copies of text with redrawn tokens, against the definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.core import head, portions
from hfprune_dist.core.head import Outputs
from hfprune_dist.core.redraw import REDRAWN, redrawn_copy


def outputs_of(logits_TV):
    """Outputs whose head's logits these are."""
    return Outputs(logits_TV, torch.eye(logits_TV.shape[1]), None)


def certain(next_T, vocabulary):
    """Outputs of a model that is certain of each next token."""
    return outputs_of(100.0 * torch.nn.functional.one_hot(next_T, vocabulary).float())


@settings(max_examples=30)
@given(length=st.integers(1, 40), window=st.integers(0, 99))
def test_redrawn_tokens_are_what_the_model_expects_after_the_original_text(length, window):
    ids_T, next_T = torch.randint(0, 5, (length,)), torch.randint(5, 9, (length,))
    original_T = ids_T.clone()
    copied_T = redrawn_copy(ids_T, certain(next_T, 9), window=window)
    assert torch.equal(ids_T, original_T) and copied_T.dtype == torch.int64 and copied_T[0] == ids_T[0]
    redrawn = copied_T[1:] >= 5
    assert torch.equal(copied_T[1:][redrawn], next_T[:-1][redrawn])
    assert torch.equal(copied_T[1:][~redrawn], ids_T[1:][~redrawn])


@settings(max_examples=10)
@given(st.integers(1, 20), st.integers(1, 7))
def test_chunks_and_blocks_of_logits_draw_the_same_tokens(rows, block_rows):
    ids_T, outputs = torch.randint(0, 30, (60,)), outputs_of(torch.randn(60, 30))
    whole_T = redrawn_copy(ids_T, outputs, window=3)
    assert not torch.equal(whole_T, redrawn_copy(ids_T, outputs, window=4))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "CHUNK_BYTES", rows * 30 * 4)
        patch.setattr(portions, "CACHE_BYTES", block_rows * 30 * 20 // torch.get_num_threads())
        assert torch.equal(redrawn_copy(ids_T, outputs, window=3), whole_T)


def test_half_of_the_tokens_come_from_the_models_distribution():
    tokens, p_V = 20_000, torch.tensor([0.2, 0.5, 0.3])
    ids_T = torch.full((tokens,), 7)
    logits_V = torch.nn.functional.pad(p_V.log(), (0, 5), value=-1e4)
    copied_T = redrawn_copy(ids_T, outputs_of(logits_V.expand(tokens, -1)), window=0)
    drawn_T = copied_T[copied_T < 7]
    assert abs(len(drawn_T) / tokens - REDRAWN) < 4 * (REDRAWN * (1 - REDRAWN) / tokens) ** 0.5
    for word, p in enumerate(p_V.tolist()):
        share = float((drawn_T == word).double().mean())
        assert abs(share - p) < 4 * (p * (1 - p) / len(drawn_T)) ** 0.5, word
