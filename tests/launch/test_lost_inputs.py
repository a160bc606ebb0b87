"""Damaged artifacts are set aside and made again, whoever finds them: the launcher, or the stage that reads them, where
their sizes and times are as committed.
"""

import pytest
from damage import behind
from hfprune_launch import run as sweep_run
from hfprune_launch import sweep
from made_stages import FakeBackend, failed
from rows import make_artifact
from sweeps import in_process, planned

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import End

ONE_CELL = {"models": ["alpha"], "ratios": [0.2]}


class Reading(FakeBackend):
    """A backend whose stages read what they need as ranks do, and then make their artifacts at once."""

    damages_again = False

    def run(self, stage, _):
        for need in map(self.store.handle, stage.needs):
            if need.verify(thorough=True).state == "corrupt":
                with need.claimed_briefly() as claim:
                    need.set_aside(claim)
                return End("lost input", f"{need.id}: set aside", 0.0)
        make_artifact(self.store, stage)
        if self.damages_again:
            damage(self.store, stage)
        return None


def damage(store, stage):
    """Change a file behind its size and times."""
    file = store.handle(stage.id).artifact / "content"
    with behind(file):
        file.write_text(stage.id[::-1])


@pytest.fixture
def wanted(config, tmp_path, monkeypatch):
    """The plan of a sweep whose artifacts are all there."""
    monkeypatch.setattr(sweep_run, "LocalBackend", Reading)
    _, plan = planned(config, **ONE_CELL)
    for stage in plan.stages.values():
        make_artifact(Store(tmp_path / "store"), stage)
    return plan


def run(config, out):
    return in_process(sweep.main, "--config", config, "--out", out, "--models", "alpha", "--ratios", "0.2")


def test_what_does_not_look_as_committed_is_set_aside_and_made_again(config, tmp_path, wanted):
    store, victim = Store(tmp_path / "store"), next(each for each in wanted.stages.values() if each.kind == "recover")
    (store.handle(victim.id).artifact / "content").write_text(victim.id[::-1])
    code, shown, said = run(config, tmp_path)
    assert code == 0, shown + said
    assert "content changed since it was committed" in shown and "1 of 8 stages to run" in shown
    assert len(list((store.root / "quarantine").iterdir())) == 1
    assert store.handle(victim.id).verify(thorough=True).state == "done"


def test_what_a_stage_finds_damaged_is_made_again_before_another_try(config, tmp_path, wanted):
    store, gone, damaged = Store(tmp_path / "store"), ["recover", "evaluate"], ["importance", "prune", "reference"]
    for stage in wanted.stages.values():
        if stage.kind in gone:
            store.handle(stage.id).discard()
        elif stage.kind in damaged:
            damage(store, stage)
    code, shown, said = run(config, tmp_path)
    assert code == 0, shown + said
    assert "missing" not in shown
    reads = {need for stage in wanted.stages.values() if stage.kind in gone for need in stage.needs}
    assert {store.handle(stage_id).verify(thorough=True).state for stage_id in reads} == {"done"}
    counts = [line.split("]")[0][1:].split("/") for line in shown.splitlines() if line.startswith("[")]
    assert counts[-1][0] == counts[-1][1] == str(len(counts)), "every try is counted"


def test_a_disk_that_damages_all_that_is_made_ends_the_sweep(config, tmp_path, wanted, monkeypatch):
    monkeypatch.setattr(Reading, "damages_again", True)
    for stage in wanted.stages.values():
        Store(tmp_path / "store").handle(stage.id).discard()
    last = next(stage for stage in wanted.stages.values() if stage.kind == "evaluate" and "lora" in stage.label)
    failed(Store(tmp_path / "store"), last, "input", "mended since")
    code, shown, _ = run(config, tmp_path)
    assert code == 1 and "set aside" in shown, "2 would be for what this command has tried"
