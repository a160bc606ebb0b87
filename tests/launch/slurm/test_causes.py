"""The cause of an attempt's death, deduced from what the attempt left behind."""

import os
import shutil
import time
from types import SimpleNamespace

import pytest
from fake_slurm import complete
from hfprune_launch.slurm.causes import RETRIES, START, explain_end
from hfprune_launch.slurm.commands import NEVER, JobInfo
from made_stages import failed, stage_of

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Ledger, Run
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

NEED = stage_of("importance", "a", {}, {"model": Input("digest", "/somewhere")})
STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"importance": NEED.as_input()})
JOB = {"ranks": 1, "time_minutes": 30, "needs": [NEED.id]}


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(Store(tmp_path / "store"))
    ledger.store.handle(STAGE.id).work.mkdir(parents=True)
    return ledger


@pytest.fixture
def attempt(ledger):
    attempt = ledger.begin(STAGE, **JOB)
    attempt.record_job("7")
    return attempt


def job(state, attempt, nodes="n1", reason="None"):
    return JobInfo("7", state, reason, nodes, attempt.intent.job_name)


def started(attempt):
    attempt.record_run(Run("7", 0, "n1", time.time() - 10))


def ended(ledger, attempt, state=None, **changes):
    return explain_end(ledger, STAGE, attempt, job(state, attempt, **changes) if state else None)


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("NODE_FAIL", "None", "bad node"),
        ("CANCELLED", "None", "cancelled"),
        ("FAILED", "BadConstraints", "input"),
        (None, "None", "killed"),
    ],
)
def test_by_state_of_the_job(ledger, attempt, state, reason, expected):
    started(attempt)
    assert ended(ledger, attempt, state, reason=reason).cause == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***", "killed"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", "out of memory"),
        ("srun: error: Unable to create step for job 7: Memory required by task is not available", "input"),
        ("srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller", "bad node"),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "bad node"),
        ("srun: error: n1: task 0: Segmentation fault (core dumped)", "killed"),
    ],
)
def test_by_the_log_where_nothing_else_says_it(ledger, attempt, line, expected):
    started(attempt)
    (attempt.folder / "7_0_log.err").write_text(f"something\n{line}\n" + "more\n" * 5)
    end = ended(ledger, attempt)
    assert end.cause == expected and (line in end.message or "raise time_minutes" in end.message)


def test_an_artifact_that_is_lost_again_is_no_death_of_a_rank(ledger, attempt):
    attempt.record_run(Run("7", 0, "n1", time.time() - 10, how="done"))
    end = ended(ledger, attempt, "COMPLETED")
    assert end.cause == "lost input" and "damaged or removed since" in end.message


def test_stages_of_a_job_that_was_dropped_need_not_lack_anything_themselves(ledger, attempt):
    first = stage_of("recover", "a dense", {}, {"model": Input("digest", "/somewhere")})
    leader = ledger.begin(first, **JOB)
    leader.record_job("7")
    assert explain_end(ledger, first, leader, job("CANCELLED", leader, reason=NEVER)).cause == "not run"
    complete(ledger.store, NEED)
    assert explain_end(ledger, first, leader, job("CANCELLED", leader, reason="Resources")).cause == "cancelled"


def test_a_time_limit_counts_against_a_stage_only_where_it_got_no_further(ledger, attempt):
    Progress(ledger.store.handle(STAGE.id).work).update("layers", 3, 9)
    for earlier, expected in ((None, "interrupted"), (2, "interrupted"), (3, "killed")):
        progress = None if earlier is None else {"phase": "layers", "done": earlier}
        attempt.record_run(Run("7", 0, "n1", time.time() - 10, progress=progress))
        assert ended(ledger, attempt, "TIMEOUT").cause == expected


def test_what_failed_before_the_ranks_is_told_by_the_batch_script(ledger, attempt):
    (attempt.folder / "exit.7.0").write_text("127 setup in the profile failed in its line 2\n")
    end = ended(ledger, attempt, "FAILED")
    assert end.cause == "input" and "setup in the profile failed in its line 2 (exit code 127)" in end.message
    attempt.record_run(Run("7", 1, "n1", time.time() - 10))
    assert ended(ledger, attempt, "FAILED").cause == "killed", "that was the end of an earlier start"


def test_a_disk_that_nobody_can_write_to_is_what_it_is(ledger, attempt, monkeypatch):
    assert "its nodes may not see that folder" in ended(ledger, attempt, "FAILED").message
    started(attempt)
    assert "a rank died without a message" in ended(ledger, attempt, "FAILED").message
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
        end = ended(ledger, attempt, "FAILED")
    assert end.cause == "input" and "No space left on device" in end.message
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    end = ended(ledger, attempt, "FAILED")
    assert end.cause == "input" and "Read-only file system" in end.message and RETRIES.get("input", 0) == 0


def test_the_log_of_an_earlier_start_says_nothing_of_the_last_end(ledger, attempt):
    started(attempt)
    log = attempt.folder / "7_0_log.err"
    log.write_text(f"{START} 0\noom_kill\n{START} 1\nended\n")
    assert ended(ledger, attempt, "FAILED").cause == "killed"
    log.write_text(f"{START} 0\nended\n{START} 1\noom_kill\n")
    assert ended(ledger, attempt, "FAILED").cause == "out of memory"


def test_what_a_rank_of_an_earlier_attempt_said_explains_nothing(ledger, attempt):
    started(attempt)
    failed(ledger.store, STAGE, "input", "no document has 31 tokens")
    assert "31 tokens" in ended(ledger, attempt, "FAILED").message
    again = ledger.begin(STAGE, **JOB)
    again.record_job("7")
    started(again)
    assert ended(ledger, again, "FAILED").cause == "killed"


@pytest.mark.parametrize(
    ("reason", "before", "after"),
    [
        (NEVER, "not run", "not run"),  # its job died after it had made what this one needs
        ("ReqNodeNotAvail, May be reserved for other job", "not run", "cancelled"),  # dropped at its submission
        ("JobHeldUser", "cancelled", "cancelled"),
        ("Dependency", "cancelled", "cancelled"),
        ("launch failed requeued held", "bad node", "bad node"),
    ],
)
def test_who_cancelled_a_job_that_never_began_follows_from_why_it_waited(ledger, attempt, reason, before, after):
    assert ended(ledger, attempt, "CANCELLED", nodes="", reason=reason).cause == before
    complete(ledger.store, NEED)
    assert ended(ledger, attempt, "CANCELLED", nodes="", reason=reason).cause == after


def test_what_explains_most_comes_first(ledger, attempt):
    """Each piece of evidence is added to all of those before it, which it explains."""

    def add(line):
        with (attempt.folder / "7_0_log.err").open("a") as stream:
            stream.write(f"{line}\n")

    started(attempt)
    added = [
        (
            "FAILED",
            "killed",
            lambda: failed(ledger.store, STAGE, "code", "Timed out waiting 4000ms for recv operation"),
        ),
        ("FAILED", "code", lambda: failed(ledger.store, STAGE, "code", "ValueError: we are wrong", rank=1)),
        ("FAILED", "out of memory", lambda: add("Detected 1 oom_kill event")),
        ("PREEMPTED", "interrupted", lambda: None),
        ("FAILED", "input", lambda: failed(ledger.store, STAGE, "input", "no such text", rank=2)),
        (
            "FAILED",
            "not run",
            lambda: attempt.record_run(Run("7", 1, "n1", time.time(), time.time(), "duplicate")),
        ),
        ("CANCELLED", "cancelled", lambda: None),
        ("NODE_FAIL", "done", lambda: complete(ledger.store, STAGE)),
    ]
    for state, expected, more in added:
        more()
        assert ended(ledger, attempt, state).cause == expected


def test_a_stage_that_its_job_did_not_come_to_was_not_run(ledger, attempt):
    second = ledger.begin(NEED, 1, time_minutes=30, leader=attempt)
    assert second.job_id == "7" and second.intent.job_name == attempt.intent.job_name
    for state in ("FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", None):
        assert explain_end(ledger, NEED, second, job(state, second) if state else None).cause == "not run"
    second.record_run(Run("7", 0, "n1", time.time()))
    assert explain_end(ledger, NEED, second, job("FAILED", second)).cause == "killed"
