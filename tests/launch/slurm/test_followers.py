"""Followers that are cancelled, or whose store can't be read for a while."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from fake_slurm import Clock, Controller, Job
from hfprune_launch.slurm.attempt_records import Run
from hfprune_launch.slurm.attempts import Attempts
from hfprune_launch.slurm.backend import SlurmBackend
from hfprune_launch.slurm.cancel import cancel_jobs
from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.slurm.profile import Profile, Resources
from hfprune_launch.slurm.submission import Submitting
from hfprune_launch.stage.stage_file import Provenance
from made_stages import stage_of

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.cancellation import Cancellation, request_cancellation
from hfprune_dist.store.heartbeat import Failure
from hfprune_dist.store.stage import Input

STAGES = [stage_of("importance", str(n), {"n": n}, {"model": Input("digest", "/model")}) for n in range(3)]
SCORES = STAGES[0]
PRUNED = stage_of("prune", "a", {"ratio": 0.2}, {"importance": SCORES.as_input()})
CHAIN = [SCORES, PRUNED, stage_of("recover", "a", {}, {"model": PRUNED.as_input()})]


def plan_of(stages):
    """Return a plan in which the stages are wanted that no other one needs."""
    needed = {need for stage in stages for need in stage.needs}
    return Plan({stage.id: stage for stage in stages}, (), tuple(it.id for it in stages if it.id not in needed))


PLAN = plan_of(STAGES)


@pytest.fixture
def controller(monkeypatch):
    return Controller().install(monkeypatch)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def launcher(store, stages=STAGES):
    """Return a launcher and what it has told."""
    told, clock = [], Clock()
    resources = dict.fromkeys(("importance", "prune", "recover"), Resources())
    submitting = Submitting(
        Provenance(RuntimeConfig(), {}, {}),
        Profile("x", resources, None),
        Path("/code"),
        None,
        Cancellation(store.root),
    )
    backend = SlurmBackend(store, plan_of(stages), submitting, SlurmCommands(clock.sleep), told.append, clock=clock)
    return SimpleNamespace(
        start=backend.start,
        step=backend.step,
        told=told,
        follow=lambda show=lambda: None: backend.follow(show, clock.sleep),
        left=backend.unsubmitted,
        clock=clock,
    )


def cancel(store, sleep=lambda _: None):
    request_cancellation(store.root)
    return cancel_jobs(PLAN, store, SlurmCommands(lambda _: None), sleep)


def test_a_launcher_that_waits_for_room_submits_nothing_after_it_was_cancelled(controller, store):
    controller.faults = {"sbatch": ["", "limit"]}
    follower = launcher(store)
    follower.start()
    assert cancel(store).job_ids == ["101"]
    follower.follow()
    assert controller.submitted == 1 and not controller.live()
    assert [event.what for event in follower.told].count("cancelled") == 1
    again = launcher(store)
    again.start()
    assert len(controller.live()) == 3, "the cancellation concerns the launchers before it"


def test_a_launcher_that_is_cancelled_while_it_submits_leaves_the_rest(controller, store, monkeypatch):
    """It is cancelled when it has written its second intent, which it has not handed over to Slurm."""
    submit = SlurmCommands.submit

    def submitting(self, script, job_name):
        job_id = submit(self, script, job_name)
        request_cancellation(store.root)
        return job_id

    monkeypatch.setattr(SlurmCommands, "submit", submitting)
    follower = launcher(store)
    follower.start()
    assert controller.submitted == 1 and follower.left() == STAGES[1:]
    assert [attempt.end.cause for stage in STAGES[1:] for attempt in Attempts(store.root).of(stage.id)] == ["cancelled"]
    monkeypatch.setattr(SlurmCommands, "submit", submit)
    launcher(store).start()
    assert len(controller.live()) == 3


@pytest.mark.parametrize("arrives", [True, False])
def test_a_job_that_is_being_submitted_is_waited_for(controller, store, arrives):
    """Another launcher has looked for a cancellation, and its sbatch has not come back yet."""
    attempt = Attempts(store.root).begin(STAGES[0], 0, 1, 60, None)
    claim, looks = store.handle(STAGES[0].id).claim(), []

    def meanwhile(_):
        looks.append(1)
        if arrives and len(looks) == 3:
            controller.jobs["7"] = Job(attempt.intent.job_name)
            attempt.record_job("7")
            claim.release()

    cancelled = cancel(store, meanwhile)
    assert not controller.live()
    if arrives:
        assert (cancelled.job_ids, cancelled.going_on) == (["7"], [])
    else:
        assert cancelled.job_ids == [] and "submits a job" in cancelled.going_on[0], "the exit code says so"


def test_a_job_that_puts_itself_back_into_the_queue_is_cancelled_there(controller, store):
    launcher(store).start()

    def requeue(_):
        if not requeued:
            controller.end("102", "PENDING")
            requeued.append("102")

    requeued = []
    assert cancel(store, requeue).going_on == [] and requeued and not controller.live()


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.ENOTCONN])
def test_a_store_that_can_not_be_read_for_minutes_is_waited_for(controller, store, monkeypatch, number):
    follower = launcher(store)
    follower.start()
    listed, scandir = store.root / "attempts", Path.iterdir

    def fails_for_minutes(folder):
        if folder.is_relative_to(listed) and follower.clock.now < 400:
            raise OSError(number, os.strerror(number), str(folder))
        return scandir(folder)

    def show():
        for job_id in controller.live():
            controller.end(job_id, "CANCELLED" if follower.clock.now > 300 else "RUNNING")

    monkeypatch.setattr(Path, "iterdir", fails_for_minutes)
    follower.follow(show)
    ends = [attempt.end.cause for stage in STAGES for attempt in Attempts(store.root).of(stage.id)]
    assert ends == ["cancelled"] * 3 and follower.clock.now >= 400
    (told,) = {event.message for event in follower.told if event.what == "waiting"}
    assert os.strerror(number) in told and str(listed) in told


@pytest.mark.parametrize(
    ("number", "after"), [(errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EROFS, 1), (errno.EIO, 600)]
)
def test_a_full_disk_ends_a_follower_at_once_and_other_errors_in_the_end(controller, store, number, after):
    follower = launcher(store)
    follower.start()

    def show():
        raise OSError(number, os.strerror(number), "somewhere")

    with pytest.raises(OSError, match=os.strerror(number)):
        follower.follow(show)
    assert after <= follower.clock.now < after + 20


def test_slurm_is_asked_once_a_minute_while_nothing_happens(controller, store):
    follower = launcher(store)
    follower.start()
    begun = len(controller.called)

    def show():
        for job_id in controller.live():
            controller.end(job_id, "CANCELLED" if follower.clock.now > 7200 else "RUNNING")

    follower.follow(show)
    assert set(controller.called[begun:]) == set(controller.calls("squeue")) and len(controller.called) - begun < 140


def test_an_end_that_a_job_has_recorded_is_noticed_before_slurm_is_asked(controller, store):
    follower = launcher(store)
    follower.start()
    attempt = Attempts(store.root).last(STAGES[0].id)
    ended_at = []

    def show():
        for job_id in controller.live():
            controller.end(job_id, "RUNNING")
        if follower.clock.now > 1000 and not ended_at:
            (attempt.folder / "exit.101.0").write_text("1\n")
            controller.end("101", "FAILED")
            ended_at.append(follower.clock.now)
        if [event.job_id for event in follower.told if event.what == "ended"] == ["101"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        follower.follow(show)
    assert follower.clock.now - ended_at[0] <= 10


def make(store, stage):
    draft = store.open_draft(stage.id)
    (draft / "result").write_text("x")
    store.commit(stage, draft, {"metrics": {}})


def test_what_was_finished_while_no_launcher_was_there_has_an_end(controller, store):
    """Otherwise --status and --cancel ask Slurm about each such job for ever."""
    launcher(store).start()
    for number, stage in enumerate(STAGES[:2]):
        make(store, stage)
        Attempts(store.root).last(stage.id).record_run(Run(str(101 + number), 0, "n1", 1.0, 2.0, "done"))
        controller.jobs.pop(str(101 + number))
    called = len(controller.called)
    launcher(store).start()
    ends = [attempt.end and attempt.end.cause for stage in STAGES for attempt in Attempts(store.root).of(stage.id)]
    assert ends == ["done", "done", None] and len(controller.called) == called + 1


def test_all_that_a_lost_input_was_made_from_is_made_again(controller, store):
    first, second, third = CHAIN
    for stage in (first, second):
        make(store, stage)
    follower = launcher(store, CHAIN)
    follower.start()
    for stage in (first, second):
        store.handle(stage.id).discard()
    handle = store.handle(third.id)
    handle.report_failure(Failure("lost input", "set aside", 0, 0.0, 1))
    controller.end("101", "FAILED")
    follower.step()
    assert [controller.jobs[job_id].name.split("-")[1] for job_id in controller.live()] == [it.kind for it in CHAIN]
