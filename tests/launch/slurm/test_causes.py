"""The cause of an attempt's death, deduced from what the attempt left behind."""

import errno
import tempfile
import time
from unittest import mock

import pytest
from fake_slurm import complete
from hfprune_launch.slurm.causes import RETRIES, START, explain_end
from hfprune_launch.slurm.commands import NEVER, JobInfo
from made_stages import begun, failed, stage_of

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Ledger, Run
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

NEED = stage_of("importance", "a", {}, {"model": Input("digest", "/somewhere")})
STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"importance": NEED.as_input()})
JOB = {"time_minutes": 30, "needs": [NEED.id]}


@pytest.fixture
def ledger(tmp_path):
    ledger = Ledger(Store(tmp_path / "store"))
    ledger.store.handle(STAGE.id).work.mkdir(parents=True)
    return ledger


@pytest.fixture
def attempt(ledger):
    attempt = begun(ledger.store, STAGE, **JOB)
    attempt.record_job("7")
    return attempt


def job(state, attempt, nodes="n1", reason="None"):
    return JobInfo("7", state, reason, nodes, "", attempt.intent.job_name)


def started(attempt):
    attempt.record_run(Run("7", 0, "n1", time.time() - 10))


def ended(ledger, attempt, state=None, **changes):
    return explain_end(ledger, STAGE, attempt, job(state, attempt, **changes) if state else None)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***", "killed"),
        ("error: /store/work/progress.json: No space left on device; make room on the disk", "input"),
        ("OSError: [Errno 5] Input/output error: '/store/work/progress.json'", "killed"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", "out of memory"),
        ("srun: error: Unable to create step for job 7: Memory required by task is not available", "input"),
        ("srun: error: Unable to confirm allocation for job 7: Unable to contact slurm controller", "killed"),
        ("srun: error: n1: task 0: Segmentation fault (core dumped)", "killed"),
    ],
)
def test_by_the_log_where_nothing_else_says_it(ledger, attempt, line, expected):
    started(attempt)
    (attempt.folder / "7_0_log.err").write_text(f"{START} 0\noom_kill\n{START} 1\n{line}\n" + "more\n" * 5)
    end = ended(ledger, attempt)
    assert end.cause == expected and (line in end.message or "raise time_minutes" in end.message)


@pytest.mark.parametrize(("state", "reason"), [("FAILED", "BadConstraints"), ("DEADLINE", "None")])
def test_what_the_profile_asks_for_can_be_corrected(ledger, attempt, state, reason):
    started(attempt)
    assert ended(ledger, attempt, state, reason=reason).cause == "input"


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
    (attempt.folder / "7_srun_log.err").write_text("srun: error: n2: task 1: Exited with exit code 1\n")
    assert "not even in its log; was the disk full" in ended(ledger, attempt, "FAILED").message, "as long as it was"
    monkeypatch.setattr(tempfile, "TemporaryFile", mock.Mock(side_effect=OSError(errno.EROFS, "")))
    end = ended(ledger, attempt, "FAILED")
    assert end.cause == "input" and "Read-only file system" in end.message and RETRIES.get("input", 0) == 0


@pytest.mark.parametrize(
    ("reason", "before", "after"),
    [
        (NEVER, "interrupted", "interrupted"),  # its job died after it had made what this one needs
        ("ReqNodeNotAvail, May be reserved for other job", "interrupted", "cancelled"),  # dropped at its submission
        ("JobHeldUser", "cancelled", "cancelled"),
        ("Dependency", "cancelled", "cancelled"),
        ("launch failed requeued held", "killed", "killed"),
    ],
)
def test_who_cancelled_a_job_that_never_began_follows_from_why_it_waited(ledger, attempt, reason, before, after):
    assert ended(ledger, attempt, "CANCELLED", nodes="", reason=reason).cause == before
    complete(ledger.store, NEED)
    assert ended(ledger, attempt, "CANCELLED", nodes="", reason=reason).cause == after


def test_what_explains_most_comes_first(ledger, attempt):
    """Each piece of evidence is added to all of those before it, which it explains."""

    def says(cause, message, rank=0):
        failed(ledger.store, STAGE, cause, message, rank=rank)

    def ran(how):
        attempt.record_run(Run("7", 1, "n1", time.time(), time.time(), how))

    started(attempt)
    log = attempt.folder / "7_0_log.err"
    added = [
        ("FAILED", "killed", "a rank died without a message", lambda: says("code", "Timed out waiting 4000ms for")),
        ("FAILED", "out of memory", "oom_kill", lambda: log.write_text("Detected 1 oom_kill event")),
        ("NODE_FAIL", "killed", "its node failed", lambda: None),
        ("PREEMPTED", "interrupted", "preempted", lambda: None),
        ("OUT_OF_MEMORY", "code", "we are wrong", lambda: says("code", "ValueError: we are wrong", 1)),
        ("FAILED", "input", "no such text", lambda: says("input", "no such text", 2)),
        ("FAILED", "interrupted", "another process", lambda: ran("duplicate")),
        ("COMPLETED", "lost input", "damaged or removed since", lambda: ran("done")),
        ("CANCELLED", "cancelled", "run the same command again", lambda: None),
        ("NODE_FAIL", "done", "", lambda: complete(ledger.store, STAGE)),
    ]
    for state, cause, message, more in added:
        more()
        end = ended(ledger, attempt, state)
        assert end.cause == cause and message in end.message


def test_a_stage_that_its_job_did_not_come_to_was_interrupted(ledger, attempt):
    second = begun(ledger.store, NEED, time_minutes=30, leader=attempt)
    assert second.job_id == "7" and second.intent.job_name == attempt.intent.job_name
    for state in ("FAILED", "NODE_FAIL", "TIMEOUT", "OUT_OF_MEMORY", None):
        assert explain_end(ledger, NEED, second, job(state, second) if state else None).cause == "interrupted"
    second.record_run(Run("7", 0, "n1", time.time()))
    assert explain_end(ledger, NEED, second, job("FAILED", second)).cause == "killed"
