"""Searches for a plain shape that end early, in any phase: the rest is done once, with the bits of as many ranks."""

import shutil
from collections import Counter

import pytest
from faults.kill import deaths_during
from forks import INTERRUPTED, on_ranks
from ranks import SoloWorld
from safetensors.torch import load
from shapes import metrics_of, outcome, prepare, run

from hfprune_dist.distributed import layer_states
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.refit.measurement import Measurement
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.stages import finals, prune_plain
from hfprune_dist.store.artifacts import Store

SMALL = {"layers": 3, "groups": 2, "samples": 4}
PHASES = {"layers", "shapes", "final", "finalists", "refit"}
RANKS = [(1, 2), (3, 1), (2, 3)]
APPEARING = "rename", "replace"


@pytest.fixture(autouse=True)
def _finals_in_turns(monkeypatch):
    """Take the shape that loses only neurons, then the one with fewer layers: each phase of the finals comes twice."""
    monkeypatch.setattr(finals, "HOPELESS", 1e6)
    monkeypatch.setattr(prune_plain, "FINALISTS", 0)


class Interrupting(Interruption):
    """Asks all ranks to end when they check for an interruption the ``at``-th time; counts their checks."""

    def __init__(self, at=0):
        super().__init__()
        self.at, self.asked = at, 0

    def agreed(self, world):
        self.asked += 1
        return self.asked == self.at


@pytest.fixture
def worked(tmp_path, monkeypatch):
    """Return a function that lists the layers that the first rank took candidates through, and those fitted."""
    file = tmp_path / "log"

    def log(owner, name, line_of):
        original = getattr(owner, name)

        def wrapper(self, *arguments):
            result = original(self, *arguments)
            with file.open("a") as stream:
                stream.write(line_of(self, *arguments) + "\n")
            return result

        monkeypatch.setattr(owner, name, wrapper)

    log(RefittedLayers, "write", lambda self, number, *_: f"{self._folder.name}: {number} fitted")
    log(
        Measurement,
        "_through",
        lambda self, _variants, number, *_: f"{self._folder.name} {self._measurements}: {number} of {self._world.rank}",
    )
    return lambda: [line for line in file.read_text().splitlines() if line.endswith((" of 0", "fitted"))]


@pytest.mark.parametrize(("refit", "first"), [("dense", 1), ("layerwise", 3)])
def test_no_layer_is_measured_or_fitted_twice_however_often_an_attempt_ends(tmp_path, worked, refit, first):
    """It is asked to end after some layers of any phase, and resumes on another number of ranks, up to rounding."""
    reference, stage = prepare(tmp_path / "whole", **SMALL, refit=refit)
    shutil.copytree(reference.root, tmp_path / "before")
    asked = Interrupting()
    run(reference, stage, SoloWorld(), asked)
    once = worked()
    assert {line.partition(" ")[0].partition("-")[0].rstrip(":") for line in once} == PHASES
    assert {name.split(" ")[0] for name in metrics_of(reference, stage)["finalists_kl"]} == {"2", "3"}
    for number, at in enumerate(range(first, asked.asked + 1, 7)):
        (tmp_path / "log").unlink()
        store = Store(shutil.copytree(tmp_path / "before", tmp_path / str(at)))
        before, after = RANKS[number % len(RANKS)]
        codes = on_ranks(before, lambda world, store=store, at=at: run(store, stage, world, Interrupting(at))).codes
        assert codes == [INTERRUPTED] * before
        assert on_ranks(after, lambda world, store=store: run(store, stage, world)).codes == [0] * after
        assert Counter(worked()) == Counter(once), f"asked to end the {at}. time"
        (files, _), (expected, _) = outcome(store, stage), outcome(reference, stage)
        for name in ("kept.json", "config.json"):
            assert files[name] == expected[name]
        ours, theirs = load(files["model.safetensors"]), load(expected["model.safetensors"])
        assert ours.keys() == theirs.keys()
        for name, tensor in theirs.items():
            assert (ours[name] - tensor).norm() <= 1e-3 * tensor.norm(), name


@pytest.mark.parametrize(("every", "saves"), [(0.0, True), (3600.0, False)])
def test_measurements_save_when_it_is_time(tmp_path, monkeypatch, every, saves):
    saved, original = set(), layer_states.LayerStates.save

    def noted(self, done, hidden):
        saved.add((self._folder, done))
        original(self, done, hidden)

    monkeypatch.setattr(layer_states, "SAVE_EVERY_S", every)
    monkeypatch.setattr(layer_states.LayerStates, "save", noted)
    store, stage = prepare(tmp_path, **SMALL, refit="dense")
    run(store, stage, SoloWorld())
    passes = Counter(folder for folder, _ in saved)
    assert bool(passes) is saves and set(passes.values()) <= {SMALL["layers"]}


def test_each_layer_of_the_dense_model_is_checked_once_for_all_refits(tmp_path, monkeypatch):
    checked, original = [], LayerStream.require_residual

    def noted(self, *arguments):
        checked.append(self._done)
        original(self, *arguments)

    monkeypatch.setattr(LayerStream, "require_residual", noted)
    store, stage = prepare(tmp_path, **SMALL, refit="layerwise")
    run(store, stage, SoloWorld())
    assert len(metrics_of(store, stage)["finalists_kl"]) == 2
    assert sorted(checked) == list(range(SMALL["layers"]))


def test_a_refit_that_is_over_is_not_gone_through_again(tmp_path, monkeypatch):
    """If an attempt ends after the refit, the windows aren't taken through its layers again."""
    monkeypatch.setattr(prune_plain, "FINALISTS", 1)
    store, stage = prepare(tmp_path, **SMALL, refit="layerwise", structures=["neurons", "kv_groups"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finals.Finals, "_measurement", lambda _: (_ for _ in ()).throw(KeyboardInterrupt))
        run(store, stage, SoloWorld())
    through, folders = SequentialRefit._through, set()

    def noted(self, *arguments, **options):
        folders.add(self._fitted._folder.name)
        through(self, *arguments, **options)

    monkeypatch.setattr(SequentialRefit, "_through", noted)
    run(store, stage, SoloWorld())
    assert folders == {"refit"}, "the final one; those of finalists are over"


def test_death_before_any_file_appears_ends_with_the_same_bits(tmp_path, monkeypatch):
    """It dies before every file that is written, in every phase and for the checkpoint."""
    monkeypatch.setattr(layer_states, "SAVE_EVERY_S", 0.0)
    reference, stage = prepare(tmp_path, **SMALL)
    (tmp_path / "copies").mkdir()
    deaths = deaths_during(lambda: run(reference, stage, SoloWorld()), reference.root, tmp_path / "copies", APPEARING)
    expected, found = outcome(reference, stage), set()
    for store in map(Store, deaths):
        found |= {file.parent.name.partition("-")[0] for file in store.work(stage.id).rglob("*") if file.is_file()}
        if store.verify(stage.id).state == "missing":
            run(store, stage, SoloWorld())
        assert outcome(store, stage) == expected
    assert len(deaths) > 40 and found >= PHASES
