import json
import math
import re
from dataclasses import asdict
from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
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


def test_models_ratios_and_recoveries_are_kept_apart():
    places = list(product(("m", "n"), (0.2, 0.4), ("none", "lora")))
    rows = [
        row(method, kl, ratio) | {"model": model, "recovery": recovery}
        for number, (model, ratio, recovery) in enumerate(places, 1)
        for method, kl in (("hfprune", float(number)), ("ours", 1.0))
    ]
    found = compare_methods([rows], "hfprune")
    ours = [it for it in found if it.method == "ours"]
    assert [(it.model, it.ratio, it.recovery) for it in ours] == places
    assert [it.kl_share.mean for it in ours] == [1 / number for number in range(1, 9)]
    assert [it["recovery"] for it in shown(ours, "hfprune")] == [recovery for *_, recovery in places]


def test_a_method_that_recovers_while_it_prunes_is_set_against_the_recovered_reference():
    references = [row("hfprune", kl) | {"recovery": recovery} for kl, recovery in ((4.0, "none"), (2.0, "lora"))]
    *_, own = compare_methods([[*references, row("loraprune", 1.0) | {"recovery": "own"}]], "hfprune")
    assert own.recovery == "own" and own.kl_share.mean == 0.5


def test_times_are_averaged_and_of_memory_the_peak_counts():
    costs = [(10.0, 3), (None, None), (30.0, 5), (None, 4)]
    sweeps = [[row("ours", 0.5) | {"wall_time_s": time, "peak_memory_bytes": peak}] for time, peak in costs]
    (ours,) = compare_methods(sweeps, "ours")
    assert (ours.wall_time_s, ours.peak_memory_bytes) == (20.0, 5)
    (unknown,) = compare_methods(sweeps[1:2], "ours")
    assert unknown.wall_time_s is unknown.peak_memory_bytes is None


def test_a_divergence_beyond_all_numbers_is_a_dash():
    found = compare_methods([[row("ours", math.inf), row("other", 0.5) | {"average": None}]], "ours")
    ours, other = shown(found, "ours")
    assert (ours["KL"], ours["agreement"], ours["perplexity"], ours["avg"]) == ("-", "0.600", "20.0", "51.2")
    assert other["avg"] == "-"
    assert "KL: mean divergence" in methods_table(found, "ours") and "avg: mean of" in methods_table(found, "ours")


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
    assert overlap(rising, -rising, 0.55) == 2 / 6, "six of ten units"
    assert overlap(np.arange(4.0), np.array([2.0, 1.0, 0.0, 3.0]), 0.25) == 1.0, "high scores stay"
    assert overlap(rising, rising, 0.01) == 1.0, "at least one unit stays"


@given(st.permutations(range(7)), st.permutations(range(7)))
def test_rank_correlation_is_spearmans(first, second):
    """Without ties, 1 - 6 * sum(d^2) / (n (n^2 - 1)) with the differences d of ranks."""
    squares = sum((a - b) ** 2 for a, b in zip(first, second, strict=True))
    found = spearman(np.array(first) ** 3.0, np.exp(np.array(second)))
    assert found == pytest.approx(1 - 6 * squares / (7 * 48))


def test_tables_of_criteria_have_means_over_layers():
    pair = {"criteria": ["a", "b"], "spearman": [0.2, 0.6], "overlap": {"0.5": [0.5, 1.0]}}
    assert criteria_table([pair]).splitlines()[::2] == [
        "| criteria | Spearman | overlap, 50% kept |",
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


def test_settling_has_a_row_for_each_criterion_and_share():
    points = [
        {"windows": windows, "criterion": criterion, "share_kept": share, "overlap": windows / 100 + share / 10}
        for windows in (32, 16)
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
