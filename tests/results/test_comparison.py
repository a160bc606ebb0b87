import json
import math
from itertools import product

import pytest

from hfprune_dist.results.comparison import QUALITY, columns_of_methods, compare_methods, methods_table, note_on_methods
from hfprune_dist.results.markdown import cells
from hfprune_dist.results.metrics import METRICS


def row(method, kl, ratio=0.2, status="done", measured_as="0123456789ab"):
    quality = {"kl": kl, "top1_agreement": 0.6, "perplexity": 20.0, "average": 0.512}
    measures = {**quality, "wall_time_s": 10.0, "peak_memory_bytes": 2**30}
    of_cell = {"model": "m", "ratio": ratio, "method": method, "recovery": "none", "status": status}
    return {**of_cell, "measured_as": measured_as, **measures}


def shown(comparisons, reference):
    """Return a map from header to cell for each row."""
    columns = columns_of_methods(comparisons, reference, wide=True)
    return [dict(zip([it.header for it in columns], row, strict=True)) for row in cells(comparisons, columns)]


def test_methods_are_set_against_the_reference_of_their_own_sweep():
    sweeps = [[row("hfprune", 1.0), row("ours", 0.5)], [row("hfprune", 2.0), row("ours", 0.6)]]
    reference, ours = compare_methods(sweeps, "hfprune")
    assert reference["kl_share"] == 1.0 and ours["kl_share"] == pytest.approx(0.4)
    assert ours["kl"] == pytest.approx(0.55) and ours["kl_stderr"] == pytest.approx(0.0707, 1e-3)
    assert ours["sweeps"] == 2
    texts = [it.header for it in columns_of_methods([reference, ours], "hfprune", wide=True) if it.is_text]
    assert texts == ["model", "ratio", "method"]
    assert {it["ratio"] for it in shown([reference, ours], "hfprune")} == {"0.2"}
    assert ours["peak_memory_bytes"] == 2**30
    assert shown([reference, ours], "hfprune")[1]["KL"] == "0.550±0.071"


def test_a_share_over_fewer_seeds_than_its_row_has_says_so():
    sweeps = [[row("hfprune", 1.0), row("ours", 0.5)], [row("hfprune", 2.0, status="missing"), row("ours", 0.6)]]
    found = compare_methods(sweeps, "hfprune")
    assert "KL / hfprune: over the seeds that have both methods (m 0.2 ours none 1 of 2)" in note_on_methods(
        found, "hfprune", wide=False
    )
    assert shown(found, "hfprune")[1]["KL / hfprune"] == "0.500" and shown(found, "hfprune")[1]["seeds"] == "2"
    whole = compare_methods(sweeps[:1], "hfprune")
    assert "over the seeds" not in note_on_methods(whole, "hfprune", wide=False)


def test_what_only_a_later_sweep_has_stands_beside_its_model():
    first = [row("hfprune", 1.0), row("hfprune", 1.0) | {"model": "n"}]
    later = [row("ours", 1.0, 0.1), row("ours", 1.0)]
    found = compare_methods([first, later], "hfprune")
    assert [(it["model"], it["ratio"], it["method"]) for it in found] == [
        ("m", 0.1, "ours"),
        ("m", 0.2, "hfprune"),
        ("m", 0.2, "ours"),
        ("n", 0.2, "hfprune"),
    ]


def test_models_ratios_and_recoveries_are_kept_apart():
    places = list(product(("m", "n"), (0.2, 0.4), ("none", "lora")))
    rows = [
        row(method, kl, ratio) | {"model": model, "recovery": recovery}
        for number, (model, ratio, recovery) in enumerate(places, 1)
        for method, kl in (("hfprune", float(number)), ("ours", 1.0))
    ]
    found = compare_methods([rows], "hfprune")
    ours = [it for it in found if it["method"] == "ours"]
    assert [(it["model"], it["ratio"], it["recovery"]) for it in ours] == places
    assert [it["kl_share"] for it in ours] == [1 / number for number in range(1, 9)]
    assert [it["recovery"] for it in shown(ours, "hfprune")] == [recovery for *_, recovery in places]


def test_a_method_that_recovers_while_it_prunes_is_set_against_the_recovered_reference():
    references = [row("hfprune", kl) | {"recovery": recovery} for kl, recovery in ((4.0, "none"), (2.0, "lora"))]
    *_, own = compare_methods([[*references, row("loraprune", 1.0) | {"recovery": "own"}]], "hfprune")
    assert own["recovery"] == "own" and own["kl_share"] == 0.5


def test_times_are_averaged_and_of_memory_the_peak_counts():
    costs = [(10.0, 3), (None, None), (30.0, 5), (None, 4)]
    sweeps = [[row("ours", 0.5) | {"wall_time_s": time, "peak_memory_bytes": peak}] for time, peak in costs]
    (ours,) = compare_methods(sweeps, "ours")
    assert (ours["wall_time_s"], ours["peak_memory_bytes"]) == (20.0, 5)
    (unknown,) = compare_methods(sweeps[1:2], "ours")
    assert unknown["wall_time_s"] is unknown["peak_memory_bytes"] is None


def test_a_divergence_beyond_all_numbers_is_a_dash():
    found = compare_methods([[row("ours", math.inf), row("other", 0.5) | {"average": None}]], "ours")
    ours, other = shown(found, "ours")
    assert (ours["KL"], ours["agree"], ours["ppl"], ours["avg"]) == ("-", "0.600", "20.00", "51.2")
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
    assert mine["kl_share"] == 0.5 and other["kl_share"] is None


def test_missing_cells_are_left_out_and_a_single_sweep_has_no_spread():
    dense, ours = compare_methods([[row("ours", 0.5), row("other", None, status="missing"), row(None, 0.0, 0.0)]], "x")
    assert (ours["method"], dense["method"]) == ("ours", "dense")
    assert ours["kl_share"] is None and ours["kl_stderr"] is None
    assert shown([ours], "x")[0]["KL"] == "0.500"


def test_what_no_row_has_is_neither_shown_nor_explained():
    one, other = [row("hfprune", 1.0), row("ours", 0.5)], [row("hfprune", 1.2), row("ours", 0.6)]
    for sweeps, spreads in (([one], False), ([one, other], True)):
        for reference, known in (("hfprune", True), ("theirs", False)):
            found = compare_methods(sweeps, reference)
            text = methods_table(found, reference)
            assert (f"KL / {reference}" in text, "±" in text) == (known, spreads)
            assert ("standard deviation" in note_on_methods(found, "hfprune", wide=False)) == spreads
            assert (
                "time: mean of all stages" in text
                and "time:" not in note_on_methods(found, "hfprune", wide=False).split()
            )


@pytest.mark.parametrize("measure", ["kl", "top1_agreement", "perplexity", "average"])
def test_what_a_sweep_has_no_number_for_is_missing(measure):
    """A model whose logits are not numbers has a result without KL and perplexity."""
    sweeps = [[row("hfprune", 0.5), row("ours", 0.5)], [row("hfprune", 0.4), {**row("ours", 0.3), measure: None}]]
    reference, ours = compare_methods(sweeps, "hfprune")
    assert ours[measure] is None and ours["sweeps"] == 2
    assert sum(ours[it.key] is None for it in QUALITY) == 1
    assert (ours["kl_share"] is None) == (measure == "kl"), "a mean of the other sweeps' would be too low"
    header = METRICS[measure].header
    assert shown([reference, ours], "hfprune")[1][header] == "-"
    json.dumps([ours], allow_nan=False)


@pytest.mark.parametrize("sweep", range(3))
@pytest.mark.parametrize("kl", [None, 0.0])
def test_nothing_can_be_set_against_a_reference_without_a_divergence(sweep, kl):
    """A mean over the other sweeps' shares would be one of fewer seeds, without a word."""
    sweeps = [[row("hfprune", kl if it == sweep else 0.4), row("ours", 0.3)] for it in range(3)]
    found = compare_methods(sweeps, "hfprune")
    assert [it["kl_share"] for it in found] == [None, None]
    assert [it["sweeps_with_reference"] for it in found] == [3, 3]
    assert shown(found, "hfprune")[1]["KL / hfprune"] == "-"
    assert "over the seeds" not in note_on_methods(found, "hfprune", wide=False)


def test_methods_without_any_number_have_a_row():
    (ours,) = compare_methods([[row("ours", None) | {"top1_agreement": None, "perplexity": None}]], "ours")
    assert ours["kl_share"] is None and "| ours | - | - | - | 51.2 | 10s | 1.1GB | 1 |" in methods_table([ours], "ours")
