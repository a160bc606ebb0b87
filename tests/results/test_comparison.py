"""Means over seeds, and rows that are seeds of one another: nothing but the seed, and what follows from it, differs."""

import json
from itertools import product
from pathlib import Path

import pytest
from tiny import save_tiny, write_documents, write_pairs

from hfprune_dist.config.load import load_config
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import resolve_models
from hfprune_dist.planning.plan import Plan
from hfprune_dist.results.comparison import (
    columns_of_methods,
    compare_methods,
    difference,
    made_with,
    methods_table,
    note_on_methods,
)
from hfprune_dist.results.markdown import cells
from hfprune_dist.store.hashing import FileHashes

METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"


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
    sweeps = [[row("hfprune", 1.0), row("ours", 0.5)], [row("hfprune", 2.0), row("ours", 0.6) | {"wall_time_s": 20.0}]]
    found = compare_methods(sweeps, "hfprune")
    reference, ours = found
    assert reference["kl_share"] == 1.0 and ours["kl_share"] == pytest.approx(0.4)
    assert ours["kl"] == pytest.approx(0.55) and ours["kl_stderr"] == pytest.approx(0.0707, 1e-3)
    assert (ours["sweeps"], ours["wall_time_s"], ours["peak_memory_bytes"]) == (2, 15.0, 2**30)
    expected = {"ratio": "0.2", "KL": "0.550±0.071", "avg": "51.2±0.0", "seeds": "2"}
    assert shown(found, "hfprune")[1].items() >= expected.items()
    text = methods_table(found, "hfprune")
    assert "standard deviation over seeds" in text and "KL / hfprune" in text
    assert "KL / x" not in methods_table(compare_methods(sweeps, "x"), "x")


def test_a_share_over_fewer_seeds_than_its_row_has_says_so():
    sweeps = [[row("hfprune", 1.0), row("ours", 0.5)], [row("hfprune", 2.0, status="missing"), row("ours", 0.6)]]
    found = compare_methods(sweeps, "hfprune")
    assert "KL / hfprune: over the seeds that have both methods" in note_on_methods(found, "hfprune", wide=False)
    assert (shown(found, "hfprune")[1]["KL / hfprune"], found[1]["sweeps"]) == ("0.500", 2)


def test_models_ratios_and_recoveries_are_kept_apart_and_in_order():
    places = list(product(("m", "n"), (0.2, 0.4), ("none", "lora")))
    rows = [
        row(method, kl, ratio) | {"model": model, "recovery": recovery}
        for number, (model, ratio, recovery) in enumerate(places, 1)
        for method, kl in (("hfprune", float(number)), ("ours", 1.0))
    ]
    ours = [it for it in compare_methods([rows, [row("ours", 1.0, 0.1)]], "hfprune") if it["method"] == "ours"]
    assert [(it["model"], it["ratio"], it["recovery"]) for it in ours] == [("m", 0.1, "none"), *places]
    assert [it["kl_share"] for it in ours] == [None, *(1 / number for number in range(1, 9))]


def test_a_method_that_recovers_while_it_prunes_is_set_against_the_recovered_reference():
    references = [row("hfprune", kl) | {"recovery": recovery} for kl, recovery in ((4.0, "none"), (2.0, "lora"))]
    *_, own = compare_methods([[*references, row("loraprune", 1.0) | {"recovery": "own"}]], "hfprune")
    assert own["recovery"] == "own" and own["kl_share"] == 0.5


def test_a_share_is_of_a_reference_that_was_measured_alike():
    """Rows from a folder's earlier runs may have been measured on another text."""
    ours = [row("ours", 0.5), row("other", 0.6, measured_as="another")]
    _, mine, other = compare_methods([[row("hfprune", 1.0), *ours]], "hfprune")
    assert mine["kl_share"] == 0.5 and other["kl_share"] is None


@pytest.mark.parametrize("measure", ["kl", "top1_agreement", "perplexity", "average"])
def test_what_a_sweep_has_no_number_for_is_missing(measure):
    """A mean over the other sweeps would be one of fewer seeds, without a word."""
    sweeps = [[row("hfprune", 0.5), row("ours", 0.5)], [row("hfprune", 0.4), {**row("ours", 0.3), measure: None}]]
    _, ours = compare_methods(sweeps, "hfprune")
    assert ours[measure] is None and ours["sweeps"] == 2
    assert (ours["kl_share"] is None) == (measure == "kl")
    json.dumps([ours], allow_nan=False)


# Whether sweeps differ in more than their seed.


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    save_tiny(folder / "a", "llama")
    for name, seed in (("text", 0), ("copy", 0), ("other", 2), ("held", 1)):
        write_documents(folder / f"{name}.jsonl", seed=seed)
    write_pairs(folder / "pairs.jsonl")
    return folder


def made(world, method="hfprune", **overrides):
    """What a method's row is made with, from the record of a sweep."""
    base = {
        "models": [str(world / "a")],
        "ratios": [0.15],
        "methods": [method],
        "calibration.path": str(world / "text.jsonl"),
        "calibration.samples": 8,
        "recovery.path": str(world / "pairs.jsonl"),
        "evaluation.fidelity.path": str(world / "held.jsonl"),
    }
    config = load_config([], base | {key.replace("__", "."): value for key, value in overrides.items()})
    models = resolve_models(config, world / "none", FileHashes(None), download=False)
    plan = build_plan(config, models, resolve_methods(config, METHODS), FileHashes(None), str(overrides))
    plan = Plan.from_json(plan.to_json())
    return made_with(plan, next(it for it in plan.cells if (it.method, it.ratio) == (method, 0.15)))


@pytest.mark.parametrize(
    "overrides",
    [
        {"seed": 1},
        {"ratios": [0.1, 0.15], "methods": ["hfprune", "loraprune", "surgeon-plain", "flap"]},
        {"importance__criteria": ["magnitude", "fisher_signs"]},
        {"recovery__micro_batch_size": 2, "runtime__ranks": 3},
        {"efficiency__enabled": True, "calibration__path": "copy.jsonl"},
    ],
    ids=str,
)
def test_seeds_differ_in_nothing_else(world, overrides):
    if "calibration__path" in overrides:
        overrides = {**overrides, "calibration__path": str(world / overrides["calibration__path"])}
    assert difference(made(world), made(world, **overrides)) == ""


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        ({"calibration__samples": 4}, "calibration.samples (stage 1, importance) is 8 in one, 4 in the other"),
        ({"prune__refit": "layerwise"}, "refit (stage 2, prune) is 'none' in one, 'layerwise' in the other"),
        ({"recovery__epochs": 1.0}, "recovery.epochs (stage 3, recover) is 2.0 in one, 1.0 in the other"),
        ({"evaluation__fidelity__windows": 3}, "text.windows (stage 4, reference) is 64 in one, 3 in the other"),
        ({"evaluation__limit": 3}, "limit (stage 5, evaluate) is null in one, 3 in the other"),
    ],
    ids=str,
)
def test_seeds_have_the_same_settings(world, overrides, told):
    assert difference(made(world), made(world, seed=1, **overrides)) == told


def test_seeds_read_the_same_files(world):
    found = difference(made(world), made(world, seed=1, calibration__path=str(world / "other.jsonl")))
    assert found.startswith("calibration (stage 1, importance) is 'content ")
