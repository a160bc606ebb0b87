"""The cause of an attempt's death, deduced from what the attempt left behind."""

import shutil
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
from hfprune_launch.slurm import exit_causes
from hfprune_launch.slurm.attempt_records import End, Run
from hfprune_launch.slurm.attempts import Attempts
from hfprune_launch.slurm.causes import Cause
from hfprune_launch.slurm.exit_causes import (
    FRUITLESS_STARTS,
    LOG_TAIL_LINES,
    START,
    explain_end,
    log_tail,
    never_gets_further,
)
from hfprune_launch.slurm.job_info import NEVER, JobInfo
from hfprune_launch.slurm.progress import fruitless_starts
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stages import stage_of

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Failure, Progress, write_failure_record
from hfprune_dist.store.stage import Input

NEED = stage_of("importance", "a", {}, {"model": Input("digest", "/somewhere")})
STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"importance": NEED.as_input()})


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "store")
    store.work(STAGE.id).mkdir(parents=True)
    return store


@pytest.fixture
def attempt(store):
    attempt = Attempts(store.root).begin(STAGE, 8, 64, 30, None)
    attempt.record_job("7")
    return attempt


def job(state, attempt, nodes="n1"):
    return JobInfo("7", state, "None", nodes, "N/A", "N/A", attempt.intent.job_name)


def started(attempt, nodes="n1"):
    attempt.record_run(Run("7", 0, nodes, time.time() - 10))


def cause(store, attempt, state):
    return explain_end(store, STAGE, attempt, job(state, attempt) if state else None).cause


@pytest.mark.parametrize(
    ("state", "expected"),
    [
        ("NODE_FAIL", "bad node"),
        ("BOOT_FAIL", "bad node"),
        ("PREEMPTED", "interrupted"),
        ("OUT_OF_MEMORY", "out of memory"),
        ("CANCELLED", "cancelled"),
        ("FAILED", "killed"),
        ("DEADLINE", "input"),
        (None, "killed"),
    ],
)
def test_by_state_of_the_job(store, attempt, state, expected):
    started(attempt)
    assert cause(store, attempt, state) == expected


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO NODE FAILURE, SEE LOG ***",
            "bad node",
        ),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO PREEMPTION ***", "interrupted"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO TIME LIMIT ***", "interrupted"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 DUE TO JOB REQUEUE ***", "killed"),
        ("slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-01-01T00:00:00 ***", "cancelled"),
        ("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0", "out of memory"),
        ("srun: error: task 1 launch failed: Prolog error: prolog did not exit normally", "bad node"),
        ("srun: error: Task launch for StepId=7.0 failed on node n2: Communication connection failure", "bad node"),
        ("RuntimeError: CUDA error: uncorrectable ECC error encountered", "bad node"),
        ("srun: error: Unable to create step for job 7: Memory required by task is not available", "input"),
        ("srun: error: Couldn't find the specified plugin name for mpi/pmix looking at all files", "input"),
    ],
)
def test_by_the_log_where_nothing_else_says_it(store, attempt, line, expected):
    started(attempt)
    (attempt.folder / "7_0_log.err").write_text(f"something\n{line}\n" + "more\n" * 5)
    end = explain_end(store, STAGE, attempt, None)
    assert end.cause == expected and (line in end.message or "slurmstepd" in line)


def test_what_failed_before_the_ranks_is_told_by_the_batch_script(store, attempt):
    record = attempt.folder / "exit.7.0"
    record.write_text("127 setup in the profile failed in its line 2\n")
    end = explain_end(store, STAGE, attempt, job("FAILED", attempt))
    assert end.cause == "input" and "setup in the profile failed in its line 2 (exit code 127)" in end.message
    attempt.record_run(Run("7", 1, "n1", time.time() - 10))
    assert cause(store, attempt, "FAILED") == "killed", "that was the end of an earlier start"
    for damaged in ("", "127", "x"):
        (attempt.folder / "exit.7.1").write_text(damaged)
        assert cause(store, attempt, "FAILED") == "killed"


def test_a_full_disk_is_what_it_is(store, attempt, monkeypatch):
    started(attempt)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    end = explain_end(store, STAGE, attempt, job("FAILED", attempt))
    assert end.cause == "input" and "No space left on device" in end.message


def test_folders_that_nodes_may_not_see_are_suspected_only_if_a_job_left_nothing(store, attempt):
    assert "its nodes may not see that folder" in explain_end(store, STAGE, attempt, job("FAILED", attempt)).message
    started(attempt)
    assert "a rank died without a message" in explain_end(store, STAGE, attempt, job("FAILED", attempt)).message


@pytest.mark.parametrize("starts_again", [False, True])
def test_ranks_that_did_not_start_again_say_nothing_of_the_last_end(store, attempt, starts_again):
    """The batch script logs first that a job starts; what fails there ends the job before its ranks log it."""
    started(attempt)
    script, rank = (attempt.folder / f"7_{name}_log.err" for name in ("0", "1"))
    rank.write_text(f"{START} 0\nuncorrectable ECC\n")
    script.write_text(f"{START} 0\nall is well\n{START} 1\nended\n")
    if starts_again:
        with rank.open("a") as log:
            log.write(f"{START} 1\nuncorrectable ECC\n")
    assert (cause(store, attempt, "FAILED") == "bad node") == starts_again


@pytest.mark.parametrize(
    ("failure", "message", "expected"),
    [
        ("input", "no document has 31 tokens", "input"),
        ("lost input", "importance/x: set aside", "lost input"),
        ("bad node", "node n1 was allocated with GPUs, but torch finds none", "bad node"),
        ("code", "ValueError: we are wrong", "code"),
        ("code", "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]", "killed"),
        ("out of memory", "torch.OutOfMemoryError: CUDA out of memory", "out of memory"),
    ],
)
def test_by_what_a_rank_said(store, attempt, failure, message, expected):
    started(attempt)
    write_failure_record(store.work(STAGE.id), Failure(failure, message, 1, time.time()))
    end = explain_end(store, STAGE, attempt, job("FAILED", attempt))
    assert end.cause == expected
    # What a rank says after losing another rank explains nothing.
    assert message in end.message or expected == "killed"


def test_a_failure_of_an_earlier_attempt_says_nothing(store, attempt):
    started(attempt)
    write_failure_record(store.work(STAGE.id), Failure("input", "long ago", 0, attempt.intent.created - 1))
    assert cause(store, attempt, "FAILED") == "killed"


@pytest.mark.parametrize("skew", [-90.0, 90.0])
def test_the_clock_of_another_host_hides_no_reason(store, attempt, skew):
    started(attempt)
    write_failure_record(store.work(STAGE.id), Failure("input", "no such text", 0, time.time() + skew, 1))
    assert cause(store, attempt, "FAILED") == "input"


@pytest.mark.parametrize("skew", [-90.0, 90.0])
def test_the_clock_of_another_host_makes_no_failure_ours(store, attempt, skew):
    """A rank of the previous attempt may die late."""
    attempt.close(End("killed", "", time.time()))
    again = Attempts(store.root).begin(STAGE, 8, 64, 30, None)
    again.record_job("7")
    started(again)
    write_failure_record(store.work(STAGE.id), Failure("input", "of the first", 0, time.time() + skew, 1))
    assert cause(store, again, "FAILED") == "killed"
    write_failure_record(store.work(STAGE.id), Failure("code", "ValueError: of the second", 1, 0.0, 2))
    assert cause(store, again, "FAILED") == "code"


@pytest.mark.parametrize("skew", [-90.0, 90.0])
def test_what_lost_another_rank_explains_nothing_whatever_its_clock_says(store, attempt, skew):
    started(attempt)
    lost = "RuntimeError: [gloo/transport/tcp/pair.cc] Connection closed by peer [127.0.0.1]"
    write_failure_record(store.work(STAGE.id), Failure("code", lost, 0, time.time() + skew, 1))
    write_failure_record(store.work(STAGE.id), Failure("code", "ValueError: we are wrong", 1, time.time(), 1))
    end = explain_end(store, STAGE, attempt, job("FAILED", attempt))
    assert end.cause == "code" and "we are wrong" in end.message


def test_a_job_that_left_the_stage_to_another_is_a_duplicate(store, attempt):
    attempt.record_run(Run("7", 0, "n1", time.time() - 10, time.time(), "duplicate"))
    write_failure_record(store.work(STAGE.id), Failure("input", "the other's", 0, time.time()))
    end = explain_end(store, STAGE, attempt, job("FAILED", attempt))
    assert end.cause == "not run" and "another process" in end.message
    attempt.record_run(Run("7", 1, "n1", time.time()))
    assert cause(store, attempt, "FAILED") == "input", "the next start had the stage to itself"


def commit(store, stage):
    draft = store.open_draft(stage.id)
    (draft / "content").write_text("content")
    store.commit(stage, draft, {"metrics": {}})


def test_a_job_that_slurm_dropped_went_with_what_it_depends_on(store, attempt):
    dropped = replace(job("CANCELLED", attempt), reason=NEVER)
    assert explain_end(store, STAGE, attempt, dropped).cause == "not run"
    commit(store, NEED)
    assert explain_end(store, STAGE, attempt, dropped).cause == "not run", "its job died after it had made that"


def test_a_job_that_slurm_dropped_at_its_submission_has_another_reason(store, attempt):
    dropped = replace(job("CANCELLED", attempt), reason="ReqNodeNotAvail, May be reserved for other job")
    assert explain_end(store, STAGE, attempt, dropped).cause == "not run"
    commit(store, NEED)
    assert explain_end(store, STAGE, attempt, dropped).cause == "cancelled", "it waited for something else"


@pytest.mark.parametrize("reason", ["JobHeldUser", "JobHeldAdmin", "Dependency"])
def test_a_job_that_was_cancelled_while_somebody_held_it_was_not_dropped(store, attempt, reason):
    held = replace(job("CANCELLED", attempt), reason=reason)
    assert explain_end(store, STAGE, attempt, held).cause == "cancelled"


def test_a_job_without_needs_can_not_have_been_dropped_for_one(store):
    attempt = Attempts(store.root).begin(NEED, 8, 64, 30, None)
    attempt.record_job("7")
    ended = replace(job("CANCELLED", attempt), reason=NEVER)
    assert explain_end(store, NEED, attempt, ended).cause == "cancelled", "it would be tried again for ever"


def test_a_job_that_somebody_cancelled_while_it_waited_for_another_is_cancelled(store, attempt):
    waited = replace(job("CANCELLED", attempt), reason="Dependency")
    assert explain_end(store, STAGE, attempt, waited).cause == "cancelled"


def test_a_job_that_no_node_suits_is_refused(store, attempt):
    ended = replace(job("FAILED", attempt, nodes=""), reason="BadConstraints")
    assert explain_end(store, STAGE, attempt, ended).cause == "input"


def test_what_explains_most_comes_first(store, attempt):
    """Each piece of evidence is added to all of those before it, which it explains."""
    log, said = attempt.folder / "7_0_log.err", store.work(STAGE.id)

    def add(line):
        with log.open("a") as stream:
            stream.write(f"{line}\n")

    def fail(rank, cause, message):
        write_failure_record(said, Failure(cause, message, rank, time.time(), 1))

    started(attempt)
    added = [
        ("FAILED", "killed", lambda: fail(0, "code", "Timed out waiting 4000ms for recv operation")),
        ("FAILED", "code", lambda: fail(1, "code", "ValueError: we are wrong")),
        ("FAILED", "killed", lambda: add("srun: error: n2: task 1: Segmentation fault")),
        ("FAILED", "bad node", lambda: add("CUDA error: uncorrectable ECC error encountered")),
        ("PREEMPTED", "interrupted", lambda: None),
        ("PREEMPTED", "out of memory", lambda: add("slurmstepd: error: Detected 1 oom_kill event in StepId=7.0")),
        ("OUT_OF_MEMORY", "input", lambda: fail(2, "input", "no such text")),
        ("FAILED", "not run", lambda: attempt.record_run(Run("7", 1, "n1", time.time(), time.time(), "duplicate"))),
        ("FAILED", "done", lambda: commit(store, STAGE)),
    ]
    for state, expected, more in added:
        more()
        assert cause(store, attempt, state) == expected == Cause(expected)


def test_an_artifact_is_success_whatever_slurm_says(store, attempt):
    started(attempt)
    (attempt.folder / "7_0_log.err").write_text("srun: error: Node failure on n1\n")
    commit(store, STAGE)
    end = explain_end(store, STAGE, attempt, job("NODE_FAIL", attempt))
    assert (end.cause, end.message, end.log_tail, end.bad_nodes) == ("done", "", "", [])
    assert (end.state, end.nodes) == ("NODE_FAIL", "n1")


@pytest.fixture
def far_east(monkeypatch):
    """A time zone nine hours ahead of UTC."""
    monkeypatch.setenv("TZ", "JST-9")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


@pytest.mark.usefixtures("far_east")
def test_the_end_is_slurms_in_local_time_or_else_the_last_sign_of_life(store, attempt, monkeypatch):
    begin, beat, now = 1_704_067_200.0, 1_704_067_210.0, 1_704_067_300.0
    attempt.record_run(Run("7", 0, "n1", begin))

    def ended(end="N/A"):
        return explain_end(store, STAGE, attempt, replace(job("FAILED", attempt), end=end))

    monkeypatch.setattr(time, "time", lambda: now)
    assert (ended().at, ended().run_seconds) == (now, now - begin)
    assert explain_end(store, STAGE, attempt, None).at == now
    monkeypatch.setattr(time, "time", lambda: beat)
    Progress(store.work(STAGE.id)).update("calibration", 3, 9)
    monkeypatch.setattr(time, "time", lambda: now)
    assert (ended().at, ended().run_seconds, ended().gpu_seconds) == (beat, 10.0, 80.0)
    end = ended("2024-01-01T09:00:05")
    assert (end.at, end.run_seconds) == (begin + 5, 5.0)


def test_the_time_limit_is_forgiven_until_three_starts_in_a_row_got_no_further(store, attempt):
    def ends_at(done, number):
        """Return the cause of an attempt that no signal let save, so that its start has no end."""
        each = attempt if number == 0 else Attempts(store.root).begin(STAGE, 8, 64, 30, None)
        each.record_job(str(number))
        each.record_run(Run(str(number), 0, "n1", time.time() - 10))
        if done is not None:
            Progress(store.work(STAGE.id)).update("calibration", done, 9)
        each.close(end := explain_end(store, STAGE, each, job("TIMEOUT", each)))
        return end.cause

    assert [ends_at(done, number) for number, done in enumerate([None, None, 3, 3, 3, 4])] == ["interrupted"] * 6
    assert [ends_at(4, number) for number in (6, 7, 8)] == ["interrupted", "interrupted", "input"]


@pytest.mark.parametrize("nodes", ["n[1-2]", "n1,n2", ""])
def test_the_failing_node_is_named(store, attempt, nodes):
    started(attempt, nodes=nodes)
    (attempt.folder / "7_0_log.err").write_text("srun: error: Node failure on n2\n")
    assert explain_end(store, STAGE, attempt, job("NODE_FAIL", attempt)).bad_nodes == ["n2"]
    (attempt.folder / "7_0_log.err").write_text("")
    assert explain_end(store, STAGE, attempt, job("NODE_FAIL", attempt)).bad_nodes == []
    started(attempt, nodes="n4")
    assert explain_end(store, STAGE, attempt, job("NODE_FAIL", attempt)).bad_nodes == ["n4"]


def test_the_last_lines_of_a_log_are_those_that_say_something(tmp_path, monkeypatch):
    log = tmp_path / "7_0_log.err"
    idle = ["", "  ", f"{START} 0"]
    log.write_text("\n".join(line for number in range(9) for line in (*idle, f"line {number}")) + "\n")
    assert log_tail([log], 3).splitlines() == ["  7_0_log.err:", *(f"    line {number}" for number in (6, 7, 8))]
    assert len(log_tail([log]).splitlines()) == 1 + 9
    log.write_text("\n".join(map(str, range(40))))
    assert len(log_tail([log]).splitlines()) == 1 + LOG_TAIL_LINES
    log.write_text("\n".join(idle))
    assert log_tail([log]) == ""
    monkeypatch.setattr(exit_causes, "LOG_TAIL_BYTES", 4)
    log.write_text("an end of é é")  # the first of the last four bytes is in the middle of a character
    assert log_tail([log]).endswith("\ufffd é") and "an end" not in log_tail([log])


def test_gpu_seconds_count_every_start_of_the_job(store, attempt):
    attempt.record_run(Run("7", 0, "n1", 1000.0, 1010.0, "interrupted"))
    attempt.record_run(Run("7", 1, "n2", 1100.0, 1105.0, "failed"))
    end = explain_end(store, STAGE, attempt, job("FAILED", attempt))
    assert (end.run_seconds, end.gpu_seconds) == (15.0, 120.0)
    assert isinstance(end, End)


def at(phase, done):
    return {"phase": phase, "done": done, "total": 9, "updated": 0.0}


@pytest.mark.parametrize(
    ("progress", "fruitless"),
    [
        ([], 0),
        ([None], 1),
        ([None, None, None], 3),
        ([at("a", 0)], 1),
        ([at("a", 3), at("a", 4)], 0),
        ([at("a", 3), at("a", 3), None], 2),
        ([at("a", 3), None, at("a", 3)], 2),
        ([at("a", 9), at("b", 0)], 0),
        ([at("a", 5), at("b", 2), at("a", 5), at("b", 2)], 2),  # back and forth
        ([at("b", 8), at("b", 2), at("b", 4)], 1),  # what was saved was lost, so work began anew
        ([at("b", 8), at("b", 2), at("b", 4), at("b", 9)], 0),
        ([at("b", 0), at("b", 1), at("b", 0), at("b", 1), at("b", 0)], 2),  # back and forth
    ],
)
def test_starts_that_got_no_further(progress, fruitless):
    assert fruitless_starts(progress) == fruitless


@settings(derandomize=True, deadline=None)
@given(st.integers(1, 5), st.integers(1, 6), st.randoms(use_true_random=False))
def test_any_work_that_is_not_begun_anew_comes_to_an_end(phases, total, random):
    """Whatever its starts do, no job requeues itself forever."""
    history, place = [], (0, 0)
    # How often new places can be reached, times how often work may begin anew in between, times how long it may go on.
    bound = (phases * (total + 1) + 1) * FRUITLESS_STARTS * (total + 1)
    while fruitless_starts(history) < FRUITLESS_STARTS and len(history) <= bound:
        place = max(place, (random.randrange(phases), random.randrange(total + 1)))
        back = (random.randrange(place[0] + 1), 0)  # a start may end in a phase that is redone every time
        history.append(at(*(place if random.random() < 0.5 else back)))
    assert len(history) <= bound


def test_a_job_that_gets_nowhere_is_not_requeued_for_ever(store, attempt):
    runs = [Run("7", n, "n1", 100.0 * n, 100.0 * n + 50, "interrupted", at("calibration", 3)) for n in range(4)]
    for number, run in enumerate(runs):
        attempt.record_run(run)
        assert (never_gets_further(attempt) is not None) == (number == 3)
    failure = never_gets_further(attempt)
    assert "its last 3 starts of 30 minutes" in failure.message and "raise time_minutes" in failure.message
    write_failure_record(store.work(STAGE.id), failure)
    assert cause(store, attempt, "FAILED") == "input"
    attempt.record_run(Run("7", 4, "n1", 400.0, 450.0, "interrupted", at("calibration", 4)))
    assert never_gets_further(attempt) is None


def test_progress_counts_across_attempts_up_to_the_last_artifact(store, attempt):
    attempts = Attempts(store.root)
    for number, (how, done) in enumerate([("done", 9), ("killed", 4), ("killed", 4)]):
        each = attempt if number == 0 else attempts.begin(STAGE, 8, 64, 30, None)
        each.record_run(Run("7", 0, "n1", 100.0))
        each.close(End(how, "", 0.0, state="FAILED", progress=at("calibration", done)))
    last = attempts.begin(STAGE, 8, 64, 30, None)
    last.record_run(Run("8", 0, "n1", 100.0, 150.0, "interrupted", at("calibration", 4)))
    assert [each["done"] for each in last.earlier_progress()] == [4, 4, 4]
    assert never_gets_further(last) is None
    last.record_run(Run("8", 1, "n1", 200.0, 250.0, "interrupted", None))
    assert never_gets_further(last) is not None
