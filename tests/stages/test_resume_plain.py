"""Searches for a plain shape that end early: layers that were fitted are kept, and the bits are the same."""

import pytest
from faults.kill import deaths_during
from ranks import SoloWorld
from shapes import outcome, prepare, run

from hfprune_dist.refit.sequential_refit import SequentialRefit
from hfprune_dist.stages import finals, prune_plain
from hfprune_dist.store.artifacts import Store

SMALL = {"layers": 3, "groups": 2, "samples": 4}
PHASES = {"final", "refit"}
APPEARING = "rename", "replace"


@pytest.fixture(autouse=True)
def _finals_in_turns(monkeypatch):
    """Take the shape that loses only neurons, then the one with fewer layers: each phase of the finals comes twice."""
    monkeypatch.setattr(finals, "HOPELESS", 1e6)
    monkeypatch.setattr(prune_plain, "FINALISTS", 0)


def test_a_refit_that_is_over_is_not_gone_through_again(tmp_path, monkeypatch):
    """If an attempt ends after the refit, the windows aren't taken through its layers again."""
    monkeypatch.setattr(prune_plain, "FINALISTS", 1)
    store, stage = prepare(tmp_path, **SMALL, refit="layerwise", structures=["neurons", "kv_groups"])
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finals, "candidates_of", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        run(store, stage, SoloWorld())
    through, folders = SequentialRefit._through, set()

    def noted(self, *arguments, **options):
        folders.add(self._fitted._files._folder.name)
        through(self, *arguments, **options)

    monkeypatch.setattr(SequentialRefit, "_through", noted)
    run(store, stage, SoloWorld())
    assert folders == {"refit"}, "the final one; those of finalists are over"


def test_death_before_any_file_appears_ends_with_the_same_bits(tmp_path):
    """It dies before every file that is written, in every phase and for the checkpoint."""
    reference, stage = prepare(tmp_path, **SMALL)
    (tmp_path / "copies").mkdir()
    deaths = deaths_during(lambda: run(reference, stage, SoloWorld()), reference.root, tmp_path / "copies", APPEARING)
    expected, found = outcome(reference, stage), set()
    for store in map(Store, deaths):
        found |= {file.parent.name.partition("-")[0] for file in store.work(stage.id).rglob("*") if file.is_file()}
        if store.verify(stage.id).state == "missing":
            run(store, stage, SoloWorld())
        assert outcome(store, stage) == expected
    assert len(deaths) > 10 and found >= PHASES
