"""Agreement of criteria."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hfprune_dist.errors import UserError
from hfprune_dist.results.agreement import columns_of_pairs, compare_criteria, overlap, read_scores, spearman
from hfprune_dist.results.markdown import markdown
from hfprune_dist.structures.score_names import SCORES


@given(st.permutations(range(7)), st.permutations(range(7)))
def test_rank_correlation_is_spearmans(first, second):
    """Without ties, 1 - 6 * sum(d^2) / (n (n^2 - 1)) with the differences d of ranks."""
    squares = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
    found = spearman(np.array(first) ** 3.0, np.exp(np.array(second)))
    assert found == pytest.approx(1 - 6 * squares / (7 * 48))


def test_equal_scores_share_their_rank_and_where_all_are_equal_there_is_none():
    first, second = np.array([0.0, 0.0, 0.0, 2.0, 1.0]), np.array([3.0, 0.0, 1.0, 5.0, 4.0])
    assert spearman(first, second) == pytest.approx(np.corrcoef([2, 2, 2, 5, 4], [3, 1, 2, 5, 4])[0, 1])
    assert spearman(np.zeros(3), np.arange(3.0)) is None


def test_overlap_is_of_the_units_with_high_scores():
    rising = np.arange(10.0)
    assert (overlap(rising, rising, 0.5), overlap(rising, -rising, 0.5), overlap(rising, -rising, 0.8)) == (1, 0, 0.75)
    assert overlap(np.arange(4.0), np.array([2.0, 1.0, 0.0, 3.0]), 0.25) == 1.0
    assert overlap(rising, rising, 0.01) == 1.0, "at least one unit stays"


def test_pairs_of_criteria_that_score_the_same_units_are_compared_layer_by_layer(tmp_path):
    rng = np.random.default_rng(0)
    # Layer 0 has no experts, as in models whose first layers are dense.
    experts = {f"layers.{n}.experts.reap": rng.random(4 if n else 0) for n in range(3)}
    kinds = ("", "expert_neurons.", "shared_neurons.", "kv_groups.")
    names = ("entropy", "fisher")
    neurons = {f"layers.{n}.{kind}{it}": rng.random(8) for n in range(3) for kind in kinds for it in names}
    save_file(experts | neurons, tmp_path / SCORES)
    scores = read_scores(tmp_path)
    assert {name: [len(layer) for layer in layers] for name, layers in scores.items()} == {
        "entropy": [24] * 3,
        "fisher": [24] * 3,
        "reap": [0, 4, 4],
    }
    (pair,) = compare_criteria(scores, [0.5])
    assert pair["criteria"] == ["entropy", "fisher"] and len(pair["spearman"]) == 3 == len(pair["overlap"]["0.5"])
    json.dumps(pair, allow_nan=False)
    pair |= {"spearman": [0.2, 0.6, None], "overlap": {"0.5": [0.5, 1.0]}}
    table = markdown([pair], columns_of_pairs([pair])).splitlines()
    assert table[::2] == ["| criteria | Spearman | overlap at 50% |", "| entropy / fisher | 0.400 | 0.750 |"]


@pytest.mark.parametrize(("content", "told"), [(None, "missing"), (b"12", "damaged (")])
def test_scores_that_are_missing_or_damaged_are_named(tmp_path, content, told):
    if content is not None:
        (tmp_path / SCORES).write_bytes(content)
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / SCORES}: {told}")):
        read_scores(tmp_path)
