"""Means over seeds."""

import json

import pytest

from hfprune_dist.results.comparison import compare_methods, methods_table
from hfprune_dist.results.markdown import cells


def row(method, kl, ratio=0.2, status="done", measured_as="0123456789ab"):
    quality = {"kl": kl, "top1_agreement": 0.6, "perplexity": 20.0, "average": 0.512}
    measures = {**quality, "wall_time_s": 10.0, "peak_memory_bytes": 2**30}
    of_cell = {"model": "m", "ratio": ratio, "method": method, "recovery": "none", "status": status}
    return {**of_cell, "measured_as": measured_as, **measures}


def shown(comparisons, reference):
    """Return a map from header to cell for each row."""
    columns, _ = methods_table(comparisons, reference, wide=True)
    return [dict(zip([column.header for column in columns], row, strict=True)) for row in cells(comparisons, columns)]


def test_methods_are_set_against_the_reference_of_their_own_sweep():
    sweeps = [[row("hfprune", 1.0), row("ours", 0.5)], [row("hfprune", 2.0), row("ours", 0.6) | {"wall_time_s": 20.0}]]
    found = compare_methods(sweeps, "hfprune")
    reference, ours = found
    assert reference["kl_share"] == 1.0 and ours["kl_share"] == pytest.approx(0.4)
    assert ours["kl"] == pytest.approx(0.55) and ours["kl_stderr"] == pytest.approx(0.0707, 1e-3)
    assert (ours["sweeps"], ours["wall_time_s"], ours["peak_memory_bytes"]) == (2, 15.0, 2**30)
    expected = {"ratio": "0.2", "KL": "0.550±0.071", "avg": "51.2±0.0", "seeds": "2"}
    assert shown(found, "hfprune")[1].items() >= expected.items()
    assert "standard deviation over seeds" in methods_table(found, "hfprune", wide=True)[1]
    assert "KL / hfprune" in shown(found, "hfprune")[0] and "KL / x" not in shown(compare_methods(sweeps, "x"), "x")[0]


def test_a_seed_without_the_reference_has_no_share():
    sweeps = [[row("hfprune", 1.0), row("ours", 0.5)], [row("hfprune", 2.0, status="missing"), row("ours", 0.6)]]
    found = compare_methods(sweeps, "hfprune")
    assert (shown(found, "hfprune")[1]["KL / hfprune"], found[1]["sweeps"]) == ("-", 2)


def test_a_method_that_recovers_while_it_prunes_is_set_against_the_recovered_reference():
    references = [row("hfprune", kl) | {"recovery": recovery} for kl, recovery in ((4.0, "none"), (2.0, "lora"))]
    *_, own = compare_methods([[*references, row("loraprune", 1.0) | {"recovery": "own"}]], "hfprune")
    assert own["recovery"] == "own" and own["kl_share"] == 0.5


def test_rows_are_set_against_the_reference_after_the_same_recovery():
    rows = [row("hfprune", kl) | {"recovery": recovery} for kl, recovery in ((2.0, "lora"), (1.0, "full"))]
    found = compare_methods([[*rows, row("ours", 1.5) | {"recovery": "lora"}]], "hfprune")
    assert [each["kl_share"] for each in found] == [1.0, 1.0, 0.75]


@pytest.mark.parametrize("measure", ["kl", "average"])
def test_what_a_sweep_has_no_number_for_is_missing(measure):
    """A mean over the other sweeps would be one of fewer seeds, without a word."""
    sweeps = [[row("hfprune", 0.5), row("ours", 0.5)], [row("hfprune", 0.4), {**row("ours", 0.3), measure: None}]]
    _, ours = compare_methods(sweeps, "hfprune")
    assert ours[measure] is None and ours["sweeps"] == 2
    assert (ours["kl_share"] is None) == (measure == "kl")
    json.dumps([ours], allow_nan=False)
