"""Launchers on a store, with fake commands in place of Slurm: what they leave in the store and in the queue."""

import errno
import os
import re
import tempfile
import time
from pathlib import Path

import fake_slurm
import pytest
from fake_slurm import HEADER, SCORES, Controller, FakeLauncher, Job, complete, plan_of
from hfprune_launch.slurm.cli import cancel_jobs, show_status
from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.sweep_folder import Sweep
from hypothesis import given
from hypothesis import strategies as st
from made_stages import begun, failed, stage_of
from rich.console import Console
from sweeps import make_inputs, sweep

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Ledger, Run
from hfprune_dist.store.claims import Cancellation, try_claim

PRUNES = [stage_of("prune", f"a {r}", {"ratio": r}, {"importance": SCORES.as_input()}) for r in (0.2, 0.3)]
PLAN, ALONE = plan_of(SCORES, *PRUNES), plan_of(SCORES)
JOB = {"time_minutes": 60}
HELD = "launch failed requeued held"
LIMIT = "sbatch: error: AssocMaxSubmitJobLimit"
DOWN = "slurm_load_jobs error: Unable to contact slurm controller"


@pytest.fixture
def ledger(store):
    return Ledger(store)


def waits_of(store, stage, number=1):
    script = (store.root / "attempts" / stage.id / str(number) / "job.sh").read_text()
    return re.findall("--dependency=(.*)", script)


def causes(store, stage):
    return [attempt.end.cause if attempt.end else None for attempt in Ledger(store).attempts_at(stage.id)]


def started(store, plan=PLAN, **settings):
    launcher = FakeLauncher(store, plan, **settings)
    launcher.step()
    return launcher


# Submission.


def test_a_full_queue_is_filled_up_later(fake, store):
    fake.fail_next("sbatch", *[LIMIT] * 2)
    launcher = started(store)
    assert causes(store, SCORES) == [] and launcher.unsubmitted() == list(PLAN.stages.values())
    assert "the rest is submitted when jobs have ended" in launcher.told[-1].message
    for _ in range(2):
        launcher.step()
    assert len(fake.jobs) == 3 and launcher.unsubmitted() == []
    assert waits_of(store, SCORES) == [] and [waits_of(store, stage) for stage in PRUNES] == [["afterok:101"]] * 2


def test_a_job_runs_a_chain_up_to_the_stage_that_another_launcher_has(fake, store, ledger):
    plan, scores = fake_slurm.PLAN, fake_slurm.EVALUATE
    claim = try_claim(store.handle(scores.id).work)
    launcher = started(store, plan)
    assert causes(store, PRUNES[0]) == [None] and causes(store, scores) == []
    claim.release()
    launcher.step()
    assert waits_of(store, scores) == ["afterok:102"], "of its own"
    for job_id in fake.jobs:
        fake.set_state(job_id, "CANCELLED", nodes="", reason="DependencyNeverSatisfied")
    fake.fail_next("sbatch", "", LIMIT)
    launcher = started(store, plan)
    assert causes(store, PRUNES[0]) == causes(store, scores) == ["interrupted"], "none is left of what was refused"
    launcher.step()
    first, second = (ledger.open_job(stage.id) for stage in (PRUNES[0], scores))
    assert first.intent.job_name == second.intent.job_name and first.job_id == second.job_id == "105"
    assert waits_of(store, PRUNES[0], 2) == ["afterok:104"] and not (second.folder / "job.sh").exists()


# Jobs that an earlier launcher left.


def test_a_job_whose_id_was_never_written_is_adopted(fake, store, ledger):
    started(store)
    for job in (store.root / "attempts").glob("*/*/1/job.json"):
        job.unlink()
    launcher = started(store)
    assert len(fake.calls("sbatch")) == 3 and {event.what for event in launcher.told} == {"adopted"}
    assert ledger.open_job(SCORES.id).job_id == "101"


def test_what_another_launcher_has_begun_meanwhile_is_left_alone(fake, store, ledger):
    """Between a look at all stages and what is done about one of them."""
    first, other = started(store), FakeLauncher(store, PLAN)
    fake.end("101", "PREEMPTED")
    states, others_step = first.observer.states, [other.step]

    def looks(plan):
        found = states(plan)
        if others_step:
            others_step.pop()()
        return found

    first.observer.states = looks
    first.step_after(60)
    assert causes(store, SCORES) == ["interrupted", None] and len(fake.calls("sbatch")) == 4
    assert first.said("waiting") == []


def test_an_intent_that_came_to_nothing_is_submitted_again(fake, store, ledger):
    attempt = begun(ledger.store, SCORES, **JOB)
    claim = try_claim(store.handle(SCORES.id).work)
    started(store)
    assert causes(store, SCORES) == [None] and fake.calls("sbatch") == [], "its launcher may be submitting it"
    claim.release()
    started(store)
    assert causes(store, SCORES) == ["interrupted", None]
    assert fake.calls("scontrol show job --oneliner") and attempt.job_id is None, "squeue may have missed it"


# What is seen of jobs.


@pytest.mark.parametrize("jobs", [{}, {"101": Job("of somebody else on a new cluster", "RUNNING")}])
def test_a_job_that_slurm_has_forgotten_is_over_unless_the_store_shows_that_it_lives(fake, store, jobs):
    launcher = started(store, ALONE)
    fake.jobs = jobs
    claim = try_claim(store.handle(SCORES.id).work, job="101")
    for _ in range(3):
        launcher.step_after(100)
        assert causes(store, SCORES) == [None], "it holds its claim"
    claim.release()
    launcher.step_after(100)
    assert causes(store, SCORES) == ["interrupted", None]


@pytest.mark.parametrize("accounted", ["", "FAILED", "RUNNING"])
def test_a_purged_job_is_told_from_one_that_is_not_shown_by_accounting_or_its_claim(fake, store, ledger, accounted):
    """Where jobs are private, the controller says nothing of either."""
    launcher = started(store, ALONE)
    ledger.open_job(SCORES.id).record_run(Run("101", 0, "n1", time.time()))
    claim = try_claim(store.handle(SCORES.id).work, job="101")
    fake.forget("101")
    fake.shown, fake.accounting = "", {"101": accounted} if accounted else {}
    launcher.step_after(100)
    assert (causes(store, SCORES) == [None]) == (accounted != "FAILED"), "it holds its claim"
    claim.release()
    for _ in range(2):
        launcher.step_after(100)
    assert (causes(store, SCORES)[0] is None) == (accounted == "RUNNING")


# Ends.


@pytest.mark.parametrize("plan", [PLAN, ALONE])
def test_jobs_of_rows_that_are_not_of_this_run_are_told(fake, store, plan):
    started(store)
    told = [event.message for event in started(store, plan).told if "aren't of this run" in event.message]
    assert len(told) == (plan is ALONE)


def test_a_cancelled_job_waits_for_the_user(fake, store, ledger):
    launcher = started(store)
    ledger.open_job(SCORES.id).record_run(Run("101", 0, "n1", time.time()))
    fake.set_state("101", "CANCELLED")
    fake.set_state("102", "CANCELLED", nodes="", reason="DependencyNeverSatisfied")
    fake.set_state("103", "CANCELLED", nodes="", reason="Dependency")
    launcher.go_on()
    assert [causes(store, stage) for stage in PLAN.stages.values()] == [["cancelled"], ["interrupted"], ["cancelled"]]
    assert len(fake.calls("sbatch")) == 3
    started(store)
    assert len(fake.calls("sbatch")) == 6


def test_a_job_that_could_not_be_launched_is_tried_again_within_bounds(fake, store):
    launcher = started(store, ALONE)
    for number in range(4):
        job_id = str(101 + number)
        fake.set_state(job_id, "PENDING", nodes="", reason=HELD)
        launcher.step_after(1)
        assert fake.calls("scancel")[-1] == f"scancel {job_id}" and fake.jobs[job_id].state == "CANCELLED"
        launcher.step_after(1)
    assert causes(store, SCORES) == ["killed"] * 4
    started(store, ALONE)
    assert causes(store, SCORES) == ["killed"] * 4 + [None], "the same command tries again"


def test_all_that_a_lost_input_was_made_from_is_made_again(fake, store):
    third = stage_of("recover", "a", {}, {"model": PRUNES[0].as_input()})
    chain = [SCORES, PRUNES[0], third]
    launcher = started(store, plan_of(*chain))
    for stage, job_id in zip(chain, ("101", "102"), strict=False):
        complete(store, stage)
        fake.end(job_id, "COMPLETED")
    launcher.step()
    for stage in chain[:2]:
        store.handle(stage.id).discard()
    failed(store, third, "lost input", "set aside")
    fake.end("103", "FAILED")
    launcher.step()
    assert [fake.jobs[job_id].name.split("-")[1] for job_id in fake.live()] == [stage.kind for stage in chain]


# The limit.


def plans_of_two(*names):
    pairs = [[stage_of("prune", f"{name} {n}", {"n": n, "plan": name}, {}) for n in (0, 1)] for name in names]
    return [plan_of(*pair) for pair in pairs]


@given(st.data())
def test_no_more_jobs_run_than_are_allowed_whatever_ends_or_is_dropped(data):
    """Slurm starts a job with a shared name once no earlier one that has it is left; jobs end or are dropped at random,
    and launchers come and go.
    """
    limit = data.draw(st.integers(1, 3))
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        store, fake = Store(Path(folder) / "store"), Controller().install(patch)
        patch.setattr(os, "fsync", lambda _: None)
        for plan in plans_of_two("a", "b", "c"):
            started(store, plan, max_running=limit)
            for _ in range(data.draw(st.integers(0, 3))):
                waiting = [job_id for job_id in fake.live() if fake.jobs[job_id].state == "PENDING"]
                for job_id in waiting:
                    earlier = [fake.jobs[other].shared for other in fake.live() if int(other) < int(job_id)]
                    fake.set_state(job_id, "PENDING" if fake.jobs[job_id].shared in earlier else "RUNNING")
                assert sum(job.state == "RUNNING" for job in fake.jobs.values()) <= limit
                if fake.live():
                    fake.end(
                        data.draw(st.sampled_from(fake.live())), data.draw(st.sampled_from(["FAILED", "CANCELLED"]))
                    )
    assert {job.shared[-2:] for job in fake.jobs.values()} <= {f"-{number}" for number in range(1, limit + 1)}


# Following.


@pytest.mark.parametrize("after", [0, 1000])
def test_an_end_that_a_job_has_recorded_is_noticed_before_slurm_is_asked(fake, store, ledger, after):
    """Also that of one which has run since Slurm was asked."""
    launcher, ended_at = FakeLauncher(store, ALONE), []

    def show():
        if not ended_at:
            fake.end("101", "RUNNING")
        if launcher.clock.now > after and not ended_at:
            (ledger.open_job(SCORES.id).folder / "exit.101.0").write_text("1\n")
            fake.end("101", "CANCELLED")
            ended_at.append(launcher.clock.now)

    launcher.go_on(show)
    assert causes(store, SCORES) == ["cancelled"] and launcher.clock.now - ended_at[0] <= 10


@pytest.mark.parametrize("fault", ["error", "lost", "silent"])
def test_a_job_of_which_sbatch_says_nothing_is_looked_for_and_submitted_once(fake, store, fault):
    launcher = FakeLauncher(store, ALONE)
    fake.faults = {"sbatch": [fault]}
    launcher.go_on(follow=False)
    assert len(fake.live()) == 1 and launcher.unsubmitted() == []
    assert causes(store, SCORES) == (["interrupted", None] if fault == "error" else [None])


@pytest.mark.parametrize(
    ("number", "lasts", "ends_after"),
    [(errno.ENOSPC, 9e9, 0), (errno.EROFS, 9e9, 0), (errno.EIO, 9e9, 600), (errno.EIO, 400, None)],
)
def test_a_full_disk_ends_a_follower_at_once_and_other_errors_if_they_last(fake, store, number, lasts, ends_after):
    launcher = started(store)

    def show():
        if launcher.clock.now < lasts:
            raise OSError(number, os.strerror(number), "somewhere")
        for job_id in fake.live():
            fake.end(job_id, "CANCELLED")

    if ends_after is None:
        launcher.go_on(show)
        assert causes(store, SCORES) == ["cancelled"] and os.strerror(number) in launcher.said("waiting")[0]
        return
    with pytest.raises(OSError, match=os.strerror(number)):
        launcher.go_on(show)
    assert ends_after <= launcher.clock.now < ends_after + 20


# Cancellation.


def cancel(store, sleep=lambda _: None):
    Cancellation(store.root).request()
    return cancel_jobs(store, SlurmCommands(lambda _: None), sleep)


def test_a_launcher_that_waits_for_room_submits_nothing_after_it_was_cancelled(fake, store):
    fake.faults = {"sbatch": ["", "sbatch: error: AssocMaxSubmitJobLimit"]}
    (plan,) = plans_of_two("a")
    launcher = started(store, plan)
    fake.jobs["999"] = Job("mine", "RUNNING")
    assert cancel(store)[0] == ["101"] and fake.live() == ["999"]
    launcher.go_on()
    assert fake.submitted == 1 and sum("has cancelled" in message for message in launcher.said("waiting")) == 1
    started(store, plan)
    assert len(fake.live()) == 3, "the cancellation concerns the launchers before it"


@pytest.mark.parametrize("arrives", [True, False])
def test_cancel_waits_for_what_is_submitted_and_finds_what_is_unlisted_or_queued_again(fake, store, ledger, arrives):
    """Another launcher has looked for a cancellation, and its sbatch has not come back yet."""
    fake.submitted = -2  # so that ids are 99, 100 and 101
    started(store)
    (ledger.open_job(PRUNES[0].id).folder / "job.json").unlink()
    other = stage_of("evaluate", "x", {}, {})
    claim, attempt, looks = store.handle(other.id).claim(), begun(ledger.store, other, **JOB), []
    fake.listings = [HEADER + "".join(f"{job.line(i)}|;\n" for i, job in fake.jobs.items() if i != "101")]

    def meanwhile(_):
        looks.append(1)
        if len(looks) == 1:
            fake.end("100", "PENDING")
        elif arrives and len(looks) == 3:
            fake.jobs["200"] = Job(attempt.intent.job_name)
            attempt.record_job("200")
            claim.release()

    cancelled, going_on = cancel(store, meanwhile)
    assert not fake.live() and cancelled == ["99", "100", "101", *["200"] * arrives]
    assert bool(going_on) != arrives and all("submits a job" in told for told in going_on), "the exit code says so"


# Commands.


def test_dry_run_prints_what_would_be_submitted_where_there_is_no_slurm(tmp_path):
    environment = {"PATH": "/usr/bin-without-slurm"}
    config, more = make_inputs(tmp_path), ["--dry-run", "--set", "recovery.batch_size=32"]
    result = sweep(config, tmp_path / "out", "--profile", "example-gpu", *more, environment=environment)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "out").exists()
    assert result.stdout.count("#!/bin/bash") == 10 and "22 stages in 10 jobs" in result.stdout
    assert "#SBATCH --gpus-per-node=8" in result.stdout and "--kill-on-bad-exit=1" in result.stdout
    assert "#SBATCH --kill-on-invalid-dep=yes" in result.stdout
    assert "#SBATCH --dependency='afterok:<job of importance/" in result.stdout
    result = sweep(config, tmp_path / "out", "--profile", "local-cluster", environment=environment)
    assert result.returncode == 2 and "no sbatch on this machine" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


def test_status_says_at_once_that_slurm_does_not_answer(fake, store, tmp_path, capsys):
    started(store)
    before = len(fake.calls("squeue"))
    fake.fail_next("squeue", *[DOWN] * 5)
    show_status(Console(width=200), Sweep(PLAN, store, tmp_path), keep_on=False)
    shown = capsys.readouterr().out
    assert "Slurm does not answer" in shown and shown.count(" submitted  ") == 3 and "missing" not in shown
    assert len(fake.calls("squeue")) == before + 1
