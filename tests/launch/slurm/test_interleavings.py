"""Launchers and jobs in randomly drawn orders, with a Slurm that answers unreliably."""

import contextlib
import tempfile
from pathlib import Path
from unittest import mock

import pytest
from fake_slurm import PLAN, Clock, Controller, FakeLauncher, attempts_in, complete
from hfprune_launch.slurm.commands import SlurmUnavailableError
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Ledger


def faults_of(*kinds):
    return st.lists(st.sampled_from(["", *kinds]), max_size=4)


FAULTS = st.fixed_dictionaries(
    {
        "squeue": faults_of("error", "empty", "cut", "header"),
        "sbatch": faults_of("error", "lost", "silent"),
        "scontrol": faults_of("error", "empty"),
        "scancel": faults_of("error"),
    }
)
ENDS = ["run", "FAILED", "NODE_FAIL", "part", "done", "forget"]
EVENTS = st.one_of(
    st.tuples(st.just("step"), st.integers(0, 1), FAULTS, st.sampled_from([1.0, 10.0, 100.0, 400.0])),
    st.tuples(st.just("restart"), st.integers(0, 1), FAULTS, st.just(0.0)),
    st.tuples(st.just("job"), st.sampled_from(ENDS), st.integers(0, 3)),
)


class World:
    """Two launchers and one controller that share a store."""

    def __init__(self, folder):
        self.store = Store(folder / "store")
        self.controller = Controller()
        self.clock = Clock()
        self.launchers = [self.launcher(), self.launcher()]

    def launcher(self):
        return FakeLauncher(self.store, PLAN, clock=self.clock, delays=(1.0,))

    def happen(self, event):
        if event[0] == "job":
            self.change_job(*event[1:])
            return
        what, number, faults, seconds = event
        self.clock.sleep(seconds)
        self.controller.faults = {command: list(planned) for command, planned in faults.items()}
        if what == "restart":
            self.launchers[number] = self.launcher()
        launcher = self.launchers[number]
        with contextlib.suppress(SlurmUnavailableError):
            launcher.step()

    def change_job(self, what, number):
        jobs = sorted(self.controller.jobs)
        if not jobs:
            return
        job_id = jobs[number % len(jobs)]
        is_live = job_id in self.controller.live()
        if what == "forget":
            if not is_live:
                self.controller.forget(job_id)
        elif is_live and what == "run":
            self.controller.end(job_id, "RUNNING")
        elif is_live:
            self.end_job(job_id, what)

    def end_job(self, job_id, what):
        """End a job; after ``part`` of it, its next stage is done, and it goes on if it has others."""
        left = [stage for stage in self.stages_of(self.controller.jobs[job_id].name) if not self.is_done(stage)]
        for stage in {"done": left, "part": left[:1]}.get(what, []):
            complete(self.store, stage)
        is_over = what != "part" or len(left) < 2
        self.controller.end(job_id, "RUNNING" if not is_over else "COMPLETED" if what in ("done", "part") else what)

    def is_done(self, stage):
        return self.store.handle(stage.id).verify().state == "done"

    def stages_of(self, job_name):
        return [PLAN.stages[attempt.intent.stage_id] for attempt in attempts_in(self.store, job_name)]

    def check(self):
        live = [self.controller.jobs[job_id].name for job_id in self.controller.live()]
        stages = [stage.id for name in live for stage in self.stages_of(name)]
        assert len(set(stages)) == len(stages), f"two live jobs for one stage: {live}"
        for stage in PLAN.stages.values():
            for attempt in Ledger(self.store).attempts_at(stage.id):
                over = attempt.end is not None and self.store.handle(stage.id).verify().state != "done"
                assert not (over and attempt.intent.job_name in live), f"a live job was closed: {attempt.end}"


@pytest.fixture(scope="module", autouse=True)
def _quickly():
    with mock.patch("os.fsync", lambda _: None), mock.patch("hfprune_launch.slurm.causes.log_tail", lambda _: ""):
        yield


@settings(max_examples=25)
@given(st.lists(EVENTS, min_size=10, max_size=25))
def test_never_two_live_jobs_of_a_stage_and_no_live_job_given_up(events):
    with tempfile.TemporaryDirectory() as folder:
        world = World(Path(folder))
        with mock.patch("hfprune_launch.slurm.commands._run", world.controller.run):
            for event in [("restart", 0, {}, 0.0), ("restart", 1, {}, 0.0), *events]:
                world.happen(event)
                world.check()
            finish(world)


def finish(world):
    """Complete the sweep with a new launcher, now that Slurm answers again and jobs succeed."""
    world.launchers = [world.launcher()]
    world.happen(("restart", 0, {}, 0.0))
    for _ in range(30):
        for job_id in world.controller.live():
            world.end_job(job_id, "done")
        world.happen(("step", 0, {}, 100.0))
        world.check()
        if all(world.store.handle(stage_id).verify().state == "done" for stage_id in PLAN.stages):
            break
    else:
        pytest.fail("unfinished")
    for _ in range(3):
        world.happen(("step", 0, {}, 100.0))
    assert not world.controller.live(), "done again"
    assert not Ledger(world.store).open_jobs(), "every attempt ends"
