import json
import re
from dataclasses import asdict

import numpy as np
import pytest
from safetensors.numpy import save_file

from hfprune_dist.errors import UserError
from hfprune_dist.results.column import cells
from hfprune_dist.results.comparison import (
    all_columns_of_methods,
    compare_criteria,
    compare_methods,
    convergence_table,
    criteria_table,
    methods_table,
    overlap,
    read_scores,
    scores_to_compare,
    spearman,
    spread,
)
from hfprune_dist.structures.score_names import SCORES


def row(method, kl, ratio=0.2, status="done", measured_as="0123456789ab"):
    quality = {"kl": kl, "top1_agreement": 0.6, "perplexity": 20.0, "average": 0.512}
    measures = {**quality, "wall_time_s": 10.0, "peak_memory_bytes": 2**30}
    of_cell = {"model": "m", "ratio": ratio, "method": method, "recovery": "none", "status": status}
    return {**of_cell, "measured_as": measured_as, **measures}


def shown(comparisons, reference):
    """Return a map from header to cell for each row."""
    columns = all_columns_of_methods(comparisons, reference)
    return [dict(zip([it.header for it in columns], row, strict=True)) for row in cells(comparisons, columns)]


def test_methods_are_set_against_the_reference_of_their_own_sweep():
    sweeps = [[row("hfprune", 1.0), row("ours", 0.5)], [row("hfprune", 2.0), row("ours", 0.6)]]
    reference, ours = compare_methods(sweeps, "hfprune")
    assert reference.kl_share.mean == 1.0 and ours.kl_share.mean == pytest.approx(0.4)
    assert ours.measures["kl"].mean == pytest.approx(0.55) and ours.measures["kl"].deviation == pytest.approx(
        0.0707, 1e-3
    )
    assert ours.sweeps == 2
    texts = [it.header for it in all_columns_of_methods([reference, ours], "hfprune") if it.is_text]
    assert texts == ["model", "ratio", "method"]
    assert {it["ratio"] for it in shown([reference, ours], "hfprune")} == {"0.2"}
    assert ours.peak_memory_bytes == 2**30
    assert shown([reference, ours], "hfprune")[1]["KL"] == "0.550±0.071"


def test_averages_of_tasks_are_in_percent_and_without_tasks_there_is_no_column():
    (ours,) = compare_methods([[row("ours", 0.5)], [row("ours", 0.5) | {"average": 0.532}]], "ours")
    assert shown([ours], "ours")[0]["avg"] == "52.2±1.4"
    (untested,) = compare_methods([[row("ours", 0.5) | {"average": None}]], "ours")
    assert "avg" not in shown([untested], "ours")[0]


def test_a_share_is_of_a_reference_that_was_measured_alike():
    """Rows from a folder's earlier runs may have been measured on another text."""
    ours = [row("ours", 0.5), row("other", 0.6, measured_as="another")]
    _, mine, other = compare_methods([[row("hfprune", 1.0), *ours]], "hfprune")
    assert mine.kl_share.mean == 0.5 and other.kl_share is None


def test_missing_cells_are_left_out_and_a_single_sweep_has_no_spread():
    ours, dense = compare_methods([[row("ours", 0.5), row("other", None, status="missing"), row(None, 0.0, 0.0)]], "x")
    assert (ours.method, dense.method) == ("ours", "dense")
    assert ours.kl_share is None and ours.measures["kl"].deviation is None
    assert shown([ours], "x")[0]["KL"] == "0.500"


@pytest.mark.parametrize("reference", [0.5, None, 0.0])
@pytest.mark.parametrize("measure", ["kl", "top1_agreement", "perplexity", "average"])
def test_what_a_sweep_has_no_number_for_is_missing(measure, reference):
    """A model whose logits are not numbers has a result without KL and perplexity."""
    sweeps = [[row("hfprune", reference), row("ours", 0.5)], [row("hfprune", 0.4), {**row("ours", 0.3), measure: None}]]
    reference, ours = compare_methods(sweeps, "hfprune")
    assert ours.measures[measure] is None and ours.sweeps == 2
    assert sum(it is None for it in ours.measures.values()) == 1
    assert (ours.kl_share is None) == (measure == "kl"), "a mean of the other sweeps' would be too low"
    header = {"kl": "KL", "top1_agreement": "agreement", "perplexity": "perplexity", "average": "avg"}[measure]
    assert shown([reference, ours], "hfprune")[1][header] == "-"
    json.dumps([asdict(ours)], allow_nan=False)


def test_methods_without_any_number_have_a_row():
    (ours,) = compare_methods([[row("ours", None) | {"top1_agreement": None, "perplexity": None}]], "ours")
    assert ours.kl_share is None and "| ours | - | - | - | 1 | - |" in methods_table([ours], "ours")


def test_spread_is_that_of_a_sample():
    assert spread([1.0, 3.0]).deviation == pytest.approx(2**0.5)


def test_rank_correlation_and_overlap():
    rising, noise = np.arange(10.0), np.random.default_rng(0).normal(size=10)
    assert spearman(rising, np.exp(rising)) == pytest.approx(1.0)
    assert spearman(rising, -rising) == pytest.approx(-1.0)
    assert overlap(rising, rising + noise * 0, 0.5) == 1.0
    assert overlap(rising, -rising, 0.5) == 0.0
    assert overlap(rising, -rising, 0.8) == 0.75


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


def test_settling_has_a_row_for_each_criterion_and_share():
    points = [
        {"windows": windows, "criterion": criterion, "share_kept": share, "overlap": windows / 100 + share / 10}
        for windows in (16, 32)
        for criterion in ("entropy", "fisher")
        for share in (0.8, 0.5)
    ]
    lines = convergence_table(points).splitlines()
    assert lines[0] == "| criterion | kept | 16 windows | 32 windows |"
    assert lines[2] == "| entropy | 80% | 0.240 | 0.400 |" and len(lines) == 6
    late = {"windows": 32, "criterion": "surgeon", "compared": "sums of (h * dL/dh)^2", "share_kept": 0.8}
    line = convergence_table([*points, {**late, "overlap": 0.5}]).splitlines()[-1]
    assert line == "| surgeon (sums of (h * dL/dh)^2) | 80% | - | 0.500 |"


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
    neurons = {f"layers.{n}.{kind}entropy": rng.random(8) for n in range(3) for kind in ("", "expert_neurons.")}
    save_file(experts | neurons, tmp_path / "importance.safetensors")
    (pair,) = compare_criteria(scores_to_compare(tmp_path), [0.5])
    assert pair["criteria"] == ["entropy", "reap"] and len(pair["spearman"]) == 2 == len(pair["overlap"]["0.5"])
    json.dumps(pair, allow_nan=False)
    assert [len(row) for row in read_scores(tmp_path)["entropy"]] == [16] * 3
    assert [len(row) for row in read_scores(tmp_path)["reap"]] == [0, 4, 4]


def test_scores_that_are_missing_are_named(tmp_path):
    with pytest.raises(UserError, match=re.escape(f"{tmp_path / SCORES}: missing")):
        read_scores(tmp_path)
