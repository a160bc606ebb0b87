"""The ledger of attempts, of which some records may be damaged or strange; why they failed."""

import itertools
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from damage import damage
from made_stages import begun, being_made, stage_of, taken_over

from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import End, Ledger, Run, end_of_log, report_failure
from hfprune_dist.store.claims import ClaimLostError
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})
JOB = {"time_minutes": 30}
LOST = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:49152"


@pytest.fixture
def ledger(tmp_path):
    return Ledger(Store(tmp_path))


@pytest.fixture
def attempt(ledger):
    return begun(ledger.store, STAGE, **JOB)


def reread(ledger):
    return ledger.attempts_at(STAGE.id)[-1]


def test_a_damaged_record_is_absent(ledger, attempt):
    attempt.record_job("7")
    attempt.record_run(Run("8", 0, "n1", 1.0, progress={"done": 3}))
    attempt.record_run(Run("8", 1, "n1", 2.0))
    attempt.close(End("killed", "", 1.0))
    damage(attempt.folder / "job.json", 0.5, "nothing")
    assert reread(ledger).job_id == "8", "as the job says"
    damage(attempt.folder / "run.8.0.json", 0.5, "nothing")
    assert [run.restart for run in reread(ledger).runs()] == [1]
    damage(attempt.folder / "end.json", 0.5, "nothing")
    assert reread(ledger).end is None and ledger.open_job(STAGE.id) is not None
    damage(attempt.folder / "intent.json", 0.5, "nothing")
    assert ledger.attempts_at(STAGE.id) == []
    assert begun(ledger.store, STAGE, **JOB).intent.number == 2, "no number is given again"


def test_stray_files_and_folders_are_no_attempts(ledger, attempt):
    folder = attempt.folder.parent
    for name in ("notes.txt", ".nfs0001", "²", "1.old"):
        (folder / name).write_text("")
    for name in ("backup", "-3", "007", "6"):
        (folder / name).mkdir()
    assert [found.intent for found in ledger.attempts_at(STAGE.id)] == [attempt.intent]
    assert begun(ledger.store, STAGE, **JOB).intent.number == 7


@pytest.mark.parametrize(("owner", "function"), [(Path, "read_text"), (os, "listdir")])
def test_what_can_not_be_read_now_is_not_absent(ledger, attempt, monkeypatch, owner, function):
    """A disk or network error says nothing about what has been submitted."""
    attempt.record_run(Run("7", 0, "n1", 1.0))
    monkeypatch.setattr(owner, function, Mock(side_effect=PermissionError("expired")))
    for read in (attempt.runs, ledger.open_jobs, lambda: reread(ledger)):
        with pytest.raises(PermissionError, match="expired"):
            read()


def test_starts_are_in_order_whatever_the_clocks_of_their_nodes(attempt):
    attempt.record_run(Run("8", 0, "n4", 600.0, 601.0, "duplicate"))
    attempt.record_run(Run("7", 0, "n1", 900.0, 1000.0, "interrupted"))
    attempt.record_run(Run("7", 1, "n2", 400.0, 500.0, "interrupted"))
    attempt.record_run(Run("7", 10, "n3", 450.0, 550.0, "done"))
    assert [(run.job_id, run.restart) for run in attempt.runs()] == [("7", 0), ("7", 1), ("7", 10), ("8", 0)]


def test_an_attempt_whose_end_no_launcher_saw_is_closed_by_whoever_sees_its_artifact(ledger, attempt):
    attempt.record_run(Run("7", 0, "n1", 100.0))
    with being_made(ledger.store, STAGE, finished=160.0) as draft:
        (draft / "result").touch()
    for _ in range(2):
        ledger.close_done(STAGE.id)
        assert (attempt.end.cause, attempt.end.at) == ("done", 160.0)
    assert ledger.open_jobs() == []


def test_each_attempt_but_the_last_has_an_end_recorded_or_not(ledger):
    for number in (1, 2, 3):
        attempt = begun(ledger.store, STAGE)
        if number == 1:
            attempt.close(End("input", "no such file", 1.0))
    assert [end and end.cause for _, end in ledger.ends(STAGE.id)] == ["input", "cut off", None]
    with being_made(ledger.store, STAGE, attempts=3, finished=9.0, wall_time_s=1.0):
        pass
    assert ledger.ends(STAGE.id)[2][1] == End("done", "", 9.0), "its launcher was killed before it said so"
    assert ledger.jobs_of(STAGE.id) == ledger.open_jobs() == []


def test_of_a_long_log_only_the_end_is_read(tmp_path):
    (tmp_path / "log").write_bytes("caf\u00e9\nlast".encode())
    assert end_of_log(tmp_path / "log", 6) == "\ufffd\nlast" and end_of_log(tmp_path / "none", 6) == ""


# Causes and messages, the best explanation first.
NCCL = "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error."
RECORDS = [("input", "no such text"), ("killed", "no GPU"), ("code", NCCL), ("code", LOST)]


@pytest.mark.parametrize(("better", "worse"), itertools.combinations(RECORDS, 2))
@pytest.mark.parametrize("ahead", [-500.0, 500.0])
def test_the_best_explanation_does_not_depend_on_clocks(ledger, attempt, better, worse, ahead):
    """Each rank's host has a clock of its own."""
    report_failure(attempt.folder, End(*worse, 1000.0, 0))
    report_failure(attempt.folder, End(*better, 1000.0 + ahead, 1))
    found = ledger.failure(STAGE.id)
    assert (found.cause, found.message) == better


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a rank died: rank 0 by SIGKILL, from outside\nits log ends with:\n  ====", "a rank died: rank 0 by SIGKILL"),
        ('Traceback (most recent call last):\n  File "a.py"\nOSError: full', "OSError: full"),
        ("", ""),
    ],
)
def test_a_failure_in_one_line(message, line):
    told = End("code", message, 1.0).in_one_line
    assert told.startswith(line) and "\n" not in told


def test_an_exception_is_told_by_its_last_line():
    assert (End.of_rank(7, UserError("bad")).cause, End.of_rank(7, UserError("bad")).rank) == ("input", 7)
    try:
        int("x")
    except ValueError as error:
        end = End.of_rank(0, error)
    assert end.cause == "code" and end.in_one_line.startswith("ValueError: invalid literal")
    assert End.of_rank(0, MemoryError("can't allocate memory")).cause == "out of memory"


def test_a_stage_has_failed_as_its_last_attempt_did(ledger, attempt):
    """By its end, or by what its ranks say while none is recorded; not if it was interrupted."""
    report_failure(attempt.folder, End("code", LOST, 2.0, 0))
    (attempt.folder / "failure.1.json").write_text("{")
    assert ledger.failure(STAGE.id).message == LOST
    for cause in ("killed", "interrupted", "done"):
        attempt.close(End(cause, "", 3.0))
        assert ledger.failure(STAGE.id) == (attempt.end if cause == "killed" else None)
    attempt.close(End("killed", "", 3.0))
    begun(ledger.store, STAGE, **JOB)
    assert ledger.failure(STAGE.id) is None


def test_no_attempt_begins_without_its_stages_claim(store):
    lost = store.handle(STAGE.id).claim()
    taken_over(store, STAGE)
    with pytest.raises(ClaimLostError):
        Ledger(store).begin(STAGE, lost)
    assert Ledger(store).attempts_at(STAGE.id) == []
