"""Rows are seeds of one another if nothing but the seed, and what follows from it, differs."""

from pathlib import Path

import pytest
from tiny import save_tiny, write_documents, write_pairs

from hfprune_dist.config.load import load_config
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import resolve_models
from hfprune_dist.planning.plan import Plan
from hfprune_dist.results.comparison import difference, have_one_seed, made_with
from hfprune_dist.store.hashing import FileHashes

METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("seeds")
    save_tiny(folder / "a", "llama")
    for name, seed in (("text", 0), ("copy", 0), ("other", 2), ("held", 1)):
        write_documents(folder / f"{name}.jsonl", seed=seed)
    write_pairs(folder / "pairs.jsonl")
    return folder


def row(world, method="hfprune", **overrides):
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


MAKE_NO_DIFFERENCE = {
    "only the seed": {},
    "other ratios": {"ratios": [0.1, 0.15]},
    "other methods": {"methods": ["hfprune", "loraprune", "surgeon-plain", "flap"]},
    "further criteria": {"importance__criteria": ["magnitude", "fisher"]},
    "micro-batches": {"recovery__micro_batch_size": 2, "distillation__micro_batch_size": 4},
    "ranks": {"runtime__ranks": 3},
    "speed": {"efficiency__enabled": True, "efficiency__repeats": 2},
    "a copy": {"calibration__path": "copy.jsonl"},
}
DIFFER = {
    "windows": ({"calibration__samples": 4}, "importance", "calibration.samples", "8", "4"),
    "dtype": ({"importance__dtype": "float32"}, "importance", "dtype", "'bfloat16'", "'float32'"),
    "BOS": ({"calibration__add_bos_token": False}, "importance", "add_bos_token", "true", "false"),
    "a refit": ({"prune__refit": "layerwise"}, "prune", "refit", "'none'", "'layerwise'"),
    "recovery": ({"recovery__epochs": 1.0}, "recover", "recovery.epochs", "2.0", "1.0"),
    "held-out windows": ({"evaluation__fidelity__windows": 3}, "held-out reference", "text.windows", "64", "3"),
    "tasks": ({"evaluation__limit": 3}, "evaluate", "limit", "null", "3"),
}


@pytest.mark.parametrize("overrides", MAKE_NO_DIFFERENCE.values(), ids=MAKE_NO_DIFFERENCE)
def test_seeds_differ_in_nothing_else(world, overrides):
    if "calibration__path" in overrides:
        overrides = {"calibration__path": str(world / overrides["calibration__path"])}
    one, other = row(world), row(world, seed=1, **overrides)
    assert difference(one, other) is None and not have_one_seed(one, other)
    assert have_one_seed(one, row(world, **overrides))


@pytest.mark.parametrize("differ", DIFFER.values(), ids=DIFFER)
def test_seeds_have_the_same_settings(world, differ):
    overrides, stage, name, one, other = differ
    usual, changed = row(world), row(world, seed=1, **overrides)
    assert difference(usual, changed) == (stage, name, one, other)
    assert difference(changed, usual) == (stage, name, other, one)


def test_seeds_read_the_same_files(world):
    found = difference(row(world), row(world, seed=1, calibration__path=str(world / "other.jsonl")))
    assert found[:2] == ("importance", "input 'calibration'")
    assert found[2].startswith(f"{world / 'text.jsonl'} (") and found[3].startswith(str(world / "other.jsonl"))
