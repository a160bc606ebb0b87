"""The states of stages, from claims, heartbeats, failures, and what Slurm says of jobs; and logs of rows."""

import io
import json
import os
import time
from dataclasses import asdict, replace
from types import SimpleNamespace

from fake_slurm import Job
from hfprune_launch.slurm import cli
from hfprune_launch.slurm.commands import JobInfo
from hfprune_launch.slurm.launcher import Event
from hfprune_launch.slurm.status import row_logs, stage_statuses, status_table
from hfprune_launch.sweep_folder import Sweep
from made_stages import begun, failed, stage_of
from rich.console import Console

from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.store.attempts import End, Ledger, Run, local_log
from hfprune_dist.store.claims import Holder
from hfprune_dist.store.heartbeat import Heartbeat
from hfprune_dist.store.stage import Input

STAGE = stage_of("importance", "a", {}, {"model": Input("digest", "/somewhere")})
NEXT = stage_of("prune", "a 0.2", {}, {"importance": STAGE.as_input()})
CELL = Cell("a 0.2", "a", 0.2, "m", "entropy", "none", (STAGE.id,), NEXT.id)
PLAN = Plan({STAGE.id: STAGE, NEXT.id: NEXT}, (CELL,), (STAGE.id,))
DEAD = 2**22 + 1  # no process has this id
WORDS_OF_SLURM = ("job", "nodes", "attempts", "lurm")


def shown(store):
    console = Console(file=io.StringIO(), width=200)
    console.print(status_table(stage_statuses(PLAN, store, {})))
    text = console.file.getvalue()
    assert not any(word in text for word in WORDS_OF_SLURM)
    return [" ".join(line.split()) for line in text.splitlines()[1:]]


def hold(store, **changes):
    """Leave a claim on the first stage by a process that differs from this one in the given fields."""
    store.handle(STAGE.id).work.mkdir(parents=True, exist_ok=True)
    holder = replace(Holder.me(), **changes)
    (store.handle(STAGE.id).work / "claim.1").write_text(json.dumps({**asdict(holder), "token": "x"}))


def test_a_stage_that_runs_shows_how_far_it_is_and_who_runs_it(store):
    handle = store.handle(STAGE.id)
    claim = handle.claim()
    assert shown(store)[0] == f"importance a running process {os.getpid()}"
    now = time.time()
    beat = Heartbeat("calibration", 5, 9, now, now - 60, 2)
    (handle.work / "progress.json").write_text(json.dumps(asdict(beat)))
    assert shown(store) == [
        f"importance a running calibration 5/9 80s process {os.getpid()}",
        f"prune a 0.2 waiting no run yet for {STAGE.id}",
    ]
    claim.release()
    assert shown(store)[0] == "importance a missing calibration 5/9 no run yet", "as far as it came"


def test_a_stage_whose_process_died_is_told_from_one_that_runs(store):
    hold(store, pid=DEAD)
    assert shown(store)[0].startswith(f"importance a died process {DEAD} ended without giving a reason")
    failed(store, STAGE, "input", "a bad text\nand more")
    assert shown(store)[0] == "importance a failed input: a bad text"


def in_job(store, state, reason="None", name=None):
    """Return the status of the first stage, which has a job in this state."""
    attempt = Ledger(store).open_job(STAGE.id) or begun(store, STAGE, time_minutes=60)
    name = name or attempt.intent.job_name
    return stage_statuses(PLAN, store, {name: JobInfo("5", state, reason, "n1", "", name)})[0]


def test_a_job_whose_id_was_never_recorded_is_found_by_its_name(store):
    hold(store, pid=DEAD)
    status, now = in_job(store, "PENDING", "Priority"), time.time()
    assert (status.state, status.detail) == ("queued", "Priority")
    assert in_job(store, "RUNNING").state == "queued", "as long as others of its job run"
    (store.handle(STAGE.id).work / "progress.json").write_text(json.dumps(asdict(Heartbeat("calibration", 5, 9, now))))
    for start, ended, progress in ((now - 9, None, "calibration 5/9"), (now - 9, now, ""), (now + 9, None, "")):
        Ledger(store).open_job(STAGE.id).record_run(Run("5", 0, "n1", start, ended))
        status = in_job(store, "RUNNING")
        assert (status.state, status.progress) == ("running", progress), "that of an earlier start is not shown"
    status = in_job(store, "RUNNING", name="a job of another cluster")
    assert (status.state, status.nodes) == ("submitted", "")


def test_what_was_submitted_is_not_called_missing_where_slurm_does_not_answer(store):
    """Nor dead, if a launcher died at it before. What has failed is shown as it is."""
    begun(store, STAGE, time_minutes=60).record_job("5")
    assert in_job(store, "FAILED").detail == "job 5 ended (FAILED); run the same command again"
    for jobs in (None, {}):
        assert [status.state for status in stage_statuses(PLAN, store, jobs)] == ["submitted", "waiting"]
    hold(store, pid=DEAD)
    assert stage_statuses(PLAN, store, None)[0].state == "submitted"
    failed(store, STAGE, "input", "a bad text")
    assert stage_statuses(PLAN, store, None)[0].state == "failed"
    (store.handle(STAGE.id).work / "claim.1").unlink()
    failed(store, STAGE, "interrupted", "job 5 saved its work but could not requeue itself: no")
    status = in_job(store, "FAILED")
    assert status.state == "missing" and "could not requeue itself" in status.detail, "though no launcher follows"


def test_logs_are_those_of_the_last_start_on_either_side_or_say_why_there_are_none(store, tmp_path):
    def shown_log():
        return row_logs(PLAN, store, tmp_path / "logs", STAGE.fingerprint, 40).splitlines()[-1].strip()

    def log_in_job(line):
        (begun(store, STAGE, time_minutes=1).folder / "7_0_log.out").write_text(f"{line}\n")

    assert shown_log() == "no log (missing)"
    log_in_job("in a job")
    assert shown_log() == "in a job"
    (tmp_path / "logs").mkdir()
    local_log(tmp_path / "logs", begun(store, STAGE).intent).write_text("here\n")
    assert shown_log() == "here"
    log_in_job("in another")
    assert shown_log() == "in another"
    begun(store, STAGE, time_minutes=1)
    assert shown_log() == "in another", "as long as the next job waits"


def test_who_follows_asks_anew_only_once_a_job_has_begun_or_another_is_submitted(store, fake, tmp_path, monkeypatch):
    ledger, asked = Ledger(store), []
    attempts = [begun(ledger.store, STAGE, time_minutes=1)]

    def retry():
        attempts[0].close(End("killed", "", 1.0))
        attempts.append(begun(ledger.store, STAGE, time_minutes=1))
        fake.jobs["102"] = Job(attempts[1].intent.job_name, "PENDING")

    happens = {1: lambda: attempts[0].record_run(Run("101", 0, "n1", 1.0)), 2: retry}
    happens[3 + cli.LOOKS_AT_REST] = lambda: attempts[1].close(End("cancelled", "", 2.0))

    def pause(_):
        asked.append(len(fake.calls("squeue")))
        happens.get(len(asked), lambda: None)()

    monkeypatch.setattr(cli, "sleep", pause)
    cli.show_status(Console(file=io.StringIO()), Sweep(PLAN, store, tmp_path), keep_on=True)
    assert asked == [1, 2, *[3] * (1 + 2 * cli.LOOKS_AT_REST)]


def test_what_keeps_a_sweep_waiting_is_told_again_once_an_hour(store, tmp_path, monkeypatch):
    console = Console(file=io.StringIO())
    screen = cli._Screen(console, Sweep(PLAN, store, tmp_path))
    for now in (0.0, 5.0, 3601.0):
        monkeypatch.setattr(cli, "time", SimpleNamespace(monotonic=lambda now=now: now))
        screen.tell(Event("waiting", message="for Slurm"))
    assert console.file.getvalue().count("for Slurm") == 2


def test_who_follows_does_not_leave_between_two_stages(store, tmp_path, monkeypatch):
    """After a commit, the launcher holds no claim until the first stage's ranks have ended."""
    handle, looks, held = store.handle(STAGE.id), [], []
    claim = handle.claim()
    moments = iter(
        [
            lambda: handle.commit(STAGE, handle.open_draft(claim), {"metrics": {}}, claim),
            lambda: None,
            lambda: held.append(store.handle(NEXT.id).claim()),
            lambda: held[0].release(),  # by Ctrl-C
        ]
    )
    monkeypatch.setattr(cli, "sleep", lambda _: looks.append(next(moments, lambda: None)()))
    cli.show_status(Console(file=io.StringIO()), Sweep(PLAN, store, tmp_path), keep_on=True)
    assert len(held) == 1 and len(looks) == 4 + cli.LOOKS_AT_REST
    claim.release()
