"""The measurement that orders layers serves the store's other prune stages, and changes none of their bits."""

import shutil

import pytest
from made_stages import stage_of
from ranks import SoloWorld
from shapes import metrics_of, outcome, prepare, run

from hfprune_dist.stages.shape_search import ShapeSearch
from hfprune_dist.store.artifacts import Store

SMALL = {"layers": 6, "refit": "none", "samples": 4}
SEARCHED = {"allocation": "searched", "refit": "dense", "floor": 0.1, "protect_first": 0, "protect_last": 0}


@pytest.fixture
def measured(monkeypatch):
    """Return how many layers were left out in each measurement that orders layers, since the last call."""
    asked, original = [], ShapeSearch._whole_without

    def noted(self, gone):
        asked.append(len(gone))
        return original(self, gone)

    monkeypatch.setattr(ShapeSearch, "_whole_without", noted)

    def take():
        taken = sorted({*asked})
        asked.clear()
        return taken

    return take


def other(stage, **changes):
    return stage_of("prune", "other", {**stage.params.to_json(), **changes}, stage.inputs)


@pytest.mark.parametrize(("first", "second", "left"), [(0.2, 0.5, True), (0.5, 0.2, False)])
def test_another_ratio_measures_what_is_left(tmp_path, measured, first, second, left):
    store, stage = prepare(tmp_path, **SMALL, ratio=first)
    alone = Store(shutil.copytree(store.root, tmp_path / "alone"))
    run(store, stage, SoloWorld())
    before = measured()
    assert before == [*range(1, 1 + len(before))]
    run(store, other(stage, ratio=second), SoloWorld())
    here = measured()
    run(alone, other(stage, ratio=second), SoloWorld())
    assert here == measured()[len(before) :] and bool(here) is left
    assert outcome(store, other(stage, ratio=second)) == outcome(alone, other(stage, ratio=second))


@pytest.mark.parametrize(
    "changes",
    [{"micro_batch_size": 1}, {"dtype": "bfloat16"}, {"structures": ["neurons", "layers"], **SEARCHED}],
    ids=str,
)
def test_what_measures_something_else_takes_nothing(tmp_path, measured, changes):
    store, stage = prepare(tmp_path, **SMALL)
    run(store, stage, SoloWorld())
    assert measured()
    run(store, other(stage, **changes), SoloWorld())
    assert measured()[0] == 1


@pytest.mark.parametrize("damage", [b"", b"{}"], ids=repr)
def test_what_is_damaged_is_measured_again(tmp_path, measured, damage):
    store, stage = prepare(tmp_path, **SMALL, ratio=0.4)
    run(store, stage, SoloWorld())
    order, once = metrics_of(store, stage)["layers_in_order_of_dropping"], measured()
    (file,) = (it for it in (store.root / "layers").iterdir() if len(it.stem) == 20)
    file.unlink()
    file.write_bytes(damage)
    run(store, other(stage, ratio=0.35), SoloWorld())
    again = measured()
    assert again == once[: len(again)] and again
    assert metrics_of(store, other(stage, ratio=0.35))["layers_in_order_of_dropping"] == order[: len(again)]
