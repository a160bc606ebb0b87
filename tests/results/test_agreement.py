"""Agreement of criteria."""

import json
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hfprune_dist.errors import UserError
from hfprune_dist.results.agreement import (
    columns_of_pairs,
    compare_criteria,
    overlap,
    read_scores,
    scores_to_compare,
    spearman,
)
from hfprune_dist.results.markdown import markdown
from hfprune_dist.structures.score_names import SCORES


def criteria_table(pairs):
    return markdown(pairs, columns_of_pairs(pairs))


def test_rank_correlation_and_overlap():
    rising, noise = np.arange(10.0), np.random.default_rng(0).normal(size=10)
    assert spearman(rising, np.exp(rising)) == pytest.approx(1.0)
    assert spearman(rising, -rising) == pytest.approx(-1.0)
    assert overlap(rising, rising + noise * 0, 0.5) == 1.0
    assert overlap(rising, -rising, 0.5) == 0.0
    assert overlap(rising, -rising, 0.8) == 0.75
    assert overlap(rising, -rising, 0.55) == 2 / 6, "six of ten units"
    assert overlap(np.arange(4.0), np.array([2.0, 1.0, 0.0, 3.0]), 0.25) == 1.0, "high scores stay"
    assert overlap(rising, rising, 0.01) == 1.0, "at least one unit stays"


@given(st.permutations(range(7)), st.permutations(range(7)))
def test_rank_correlation_is_spearmans(first, second):
    """Without ties, 1 - 6 * sum(d^2) / (n (n^2 - 1)) with the differences d of ranks."""
    squares = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
    found = spearman(np.array(first) ** 3.0, np.exp(np.array(second)))
    assert found == pytest.approx(1 - 6 * squares / (7 * 48))


def test_equal_scores_agree_neither_by_their_order_nor_by_chance():
    """Two criteria that are independent, with 90 % zeros each; and one that tells nothing apart."""
    rng, zeros = np.random.default_rng(0), np.zeros(900)
    first, second = (rng.permutation(np.concatenate([zeros, rng.random(100) + 1])) for _ in range(2))
    ranks = [np.array([(np.sum(it < x) + np.sum(it <= x) + 1) / 2 for x in it]) for it in (first, second)]
    assert spearman(first, second) == pytest.approx(np.corrcoef(*ranks)[0, 1])
    assert abs(spearman(first, second)) < 0.1, "which is 0.6 where zeros are ranked by their place"
    assert spearman(zeros, zeros) is None is spearman(zeros[:100], rng.random(100))
    assert overlap(zeros, zeros, 0.5) == 0.5 == overlap(zeros, np.arange(900.0), 0.5)
    assert overlap(first, first, 0.55) == pytest.approx((100 + 450**2 / 900) / 550), "450 of 900 zeros are drawn"


def test_tables_of_criteria_have_means_over_layers():
    pair = {"criteria": ["a", "b"], "spearman": [0.2, 0.6], "overlap": {"0.5": [0.5, 1.0]}}
    assert criteria_table([pair]).splitlines()[::2] == [
        "| criteria | Spearman | overlap at 50% |",
        "| a / b | 0.400 | 0.750 |",
    ]


def test_every_pair_of_criteria_in_every_layer():
    scores = {name: [np.random.default_rng(seed).random(20) for seed in (k, k + 9)] for k, name in enumerate("abc")}
    pairs = compare_criteria([scores], [0.5])
    assert [pair["criteria"] for pair in pairs] == [["a", "b"], ["a", "c"], ["b", "c"]]
    assert all(len(pair["spearman"]) == 2 == len(pair["overlap"]["0.5"]) for pair in pairs)
    assert json.dumps(pairs) and criteria_table(pairs).count("\n") == 5


def test_a_layer_with_a_single_unit_has_no_rank_correlation():
    one, two = {name: [np.ones(1)] for name in "ab"}, {name: [np.ones(1), np.arange(3.0)] for name in "ab"}
    (alone,), (pair,) = compare_criteria([one], [0.5]), compare_criteria([two], [0.5])
    assert (alone["spearman"], pair["spearman"]) == ([None], [None, pytest.approx(1.0)])
    assert json.dumps([alone, pair], allow_nan=False)
    assert criteria_table([alone]).endswith("| a / b | - | 1.000 |\n"), "not nan"
    assert criteria_table([pair]).endswith("| a / b | 1.000 | 1.000 |\n"), "the mean of those that have one"


def test_scores_of_other_units_than_neurons_are_left_out(tmp_path):
    layers = range(11)
    scores = {f"layers.{layer}.{name}": np.full(4, layer / 2) for layer in layers for name in ("fisher", "entropy")}
    groups = {f"layers.{layer}.kv_groups.{name}": np.ones(2) for layer in layers for name in ("fisher", "entropy")}
    save_file(scores | groups, tmp_path / "importance.safetensors")
    read = read_scores(tmp_path)
    assert list(read) == ["entropy", "fisher"]
    assert all([row.tolist() for row in rows] == [[layer / 2] * 4 for layer in layers] for rows in read.values())


def test_criteria_are_compared_by_units_that_both_score_in_layers_that_have_some(tmp_path):
    rng = np.random.default_rng(0)
    # Layer 0 has no experts, as in models whose first layers are dense.
    experts = {f"layers.{n}.experts.{it}": rng.random(4 if n else 0) for n in range(3) for it in ("entropy", "reap")}
    kinds = ("", "expert_neurons.", "shared_neurons.")
    neurons = {f"layers.{n}.{kind}entropy": rng.random(8) for n in range(3) for kind in kinds}
    save_file(experts | neurons, tmp_path / "importance.safetensors")
    (pair,) = compare_criteria(scores_to_compare(tmp_path), [0.5])
    assert pair["criteria"] == ["entropy", "reap"] and len(pair["spearman"]) == 2 == len(pair["overlap"]["0.5"])
    json.dumps(pair, allow_nan=False)
    assert [len(row) for row in read_scores(tmp_path)["entropy"]] == [24] * 3
    assert [len(row) for row in read_scores(tmp_path)["reap"]] == [0, 4, 4]


def test_scores_that_are_missing_are_named(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / SCORES}: missing")):
        read_scores(tmp_path)


def test_scores_that_are_damaged_are_named(tmp_path):
    save_file({"layers.0.entropy": np.arange(8.0)}, tmp_path / SCORES)
    content = (tmp_path / SCORES).read_bytes()
    for damage in (content[:-1], content[:20], b""):
        (tmp_path / SCORES).write_bytes(damage)
        with pytest.raises(UserError, match=re.escape(f"{tmp_path / SCORES}: damaged (")):
            read_scores(tmp_path)
    (tmp_path / SCORES).unlink()
    (tmp_path / SCORES).mkdir()
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / SCORES}: damaged (")):
        read_scores(tmp_path)
