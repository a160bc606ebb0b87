"""Rows are seeds of one another if nothing but the seed, and what follows from it, differs."""

from pathlib import Path

import pytest
from tiny import save_tiny, write_documents, write_pairs

from hfprune_dist.config.load import load_config
from hfprune_dist.planning.build_plan import build_plan
from hfprune_dist.planning.methods import resolve_methods
from hfprune_dist.planning.model_sources import resolve_models
from hfprune_dist.planning.plan import Plan
from hfprune_dist.results.recipes import Recipe, first_difference
from hfprune_dist.store.hashing import FileHashes
from hfprune_dist.store.stage import STAGE_VERSIONS

METHODS = Path(__file__).resolve().parents[2] / "configs" / "methods"
USUAL = ["hfprune", "surgeon-distilled", "surgeon-uniform-block", "loraprune", "sdmprune"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("recipes")
    save_tiny(folder / "a", "llama")
    for name, seed in (("text", 0), ("copy", 0), ("other", 2), ("held", 1)):
        write_documents(folder / f"{name}.jsonl", seed=seed)
    write_pairs(folder / "pairs.jsonl")
    return folder


def recipe(world, method, **overrides):
    """The recipe of a method's row, from the record of a sweep."""
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
    cell = next(it for it in plan.cells if (it.method, it.ratio) == (method, 0.15))
    return Recipe.of(plan, cell)


MAKE_NO_DIFFERENCE = {
    "only the seed": {},
    "other ratios": {"ratios": [0.1, 0.15]},
    "other methods": {"methods": [*USUAL, "surgeon-block", "flap"]},
    "further criteria": {"importance__criteria": ["magnitude", "fisher"]},
    "micro-batches": {"recovery__micro_batch_size": 2, "distillation__micro_batch_size": 4},
    "ranks": {"runtime__ranks": 3},
    "speed": {"efficiency__enabled": True, "efficiency__repeats": 2},
    "a copy": {"calibration__path": "copy.jsonl"},
}
DIFFER = {
    "windows": ({"calibration__samples": 4}, "importance", "calibration.samples", ("8", "4")),
    "dtype": ({"importance__dtype": "float32"}, "importance", "dtype", ("'bfloat16'", "'float32'")),
    "BOS": ({"calibration__add_bos_token": False}, "importance", "add_bos_token", ("true", "false")),
    "a refit": ({"prune__refit": "none"}, "prune", "refit", ("'block'", "'none'")),
    "passes": ({"prune__distill": 3}, "distill", "passes", ("2", "3")),
    "training": ({"distillation__rank": 8}, "distill", "distillation.rank", ("32", "8")),
    "recovery": ({"recovery__epochs": 1.0}, "recover", "recovery.epochs", ("2.0", "1.0")),
    "held-out windows": ({"evaluation__fidelity__windows": 3}, "held-out reference", "text.windows", ("64", "3")),
    "tasks": ({"evaluation__limit": 3}, "evaluate", "limit", ("null", "3")),
    "an early end": ({"calibration__settled": 0.9}, "importance", "calibration.settled", ("null", "0.9")),
}


class TestSeeds:
    @pytest.mark.parametrize("overrides", MAKE_NO_DIFFERENCE.values(), ids=MAKE_NO_DIFFERENCE)
    @pytest.mark.parametrize("method", USUAL)
    def test_differ_in_nothing_else(self, world, method, overrides):
        if "calibration__path" in overrides:
            overrides = {"calibration__path": str(world / overrides["calibration__path"])}
        one, other = recipe(world, method), recipe(world, method, seed=1, **overrides)
        assert first_difference(one, other) is None and one.seeds != other.seeds

    @pytest.mark.parametrize(("overrides", "stage", "name", "values"), DIFFER.values(), ids=DIFFER)
    def test_have_the_same_settings(self, world, overrides, stage, name, values):
        one, other = recipe(world, "surgeon-distilled"), recipe(world, "surgeon-distilled", seed=1, **overrides)
        for pair, shown in (((one, other), values), ((other, one), values[::-1])):
            found = first_difference(*pair)
            assert (found.stage, found.name, found.one, found.other) == (stage, name, *shown)

    def test_go_through_the_same_steps(self, world):
        one, two, other = (
            recipe(world, "surgeon-uniform-block", seed=seed, prune__steps=steps)
            for seed, steps in ((0, 2), (1, 2), (1, 3))
        )
        assert first_difference(one, two) is None
        found = first_difference(one, other)
        assert (found.stage, found.name, found.one, found.other) == ("prune", "ratio", "0.075", "0.05")

    def test_read_the_same_files(self, world):
        other = recipe(world, "hfprune", seed=1, calibration__path=str(world / "other.jsonl"))
        found = first_difference(recipe(world, "hfprune"), other)
        assert (found.stage, found.name) == ("importance", "input 'calibration'")
        assert found.one.startswith(f"{world / 'text.jsonl'} (") and found.other.startswith(str(world / "other.jsonl"))

    def test_come_from_one_version_of_the_code(self, world):
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(STAGE_VERSIONS, "prune", 1)
            earlier = recipe(world, "hfprune")
        found = first_difference(earlier, recipe(world, "hfprune", seed=1))
        assert (found.stage, found.one) == ("prune", "1") and found.name == "version of the stage's code"

    def test_do_not_end_early_by_other_criteria(self, world):
        settled = {"calibration__settled": 0.9, "seed": 1}
        one, other = (
            recipe(world, "hfprune", **settled, importance__criteria=criteria) for criteria in ([], ["fisher"])
        )
        assert first_difference(one, other).name == "criteria"
