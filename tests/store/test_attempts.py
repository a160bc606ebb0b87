"""The ledger of attempts, of which some records may be damaged or strange, and what a report tells of it."""

import errno
import os
from pathlib import Path

import pytest
from made_stages import being_made, stage_of

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import End, Ledger, Run, end_of_log, past_attempts
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})
JOB = {"ranks": 1, "time_minutes": 30}


@pytest.fixture
def ledger(tmp_path):
    return Ledger(Store(tmp_path))


@pytest.fixture
def attempt(ledger):
    return ledger.begin(STAGE, **JOB)


def reread(ledger):
    return ledger.attempts_at(STAGE.id)[-1]


def damage(file):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def test_a_damaged_record_is_absent(ledger, attempt):
    attempt.record_job("7")
    attempt.record_run(Run("8", 0, "n1", 1.0, progress={"done": 3}))
    attempt.record_run(Run("8", 1, "n1", 2.0))
    attempt.close(End("killed", "", 1.0))
    damage(attempt.folder / "job.json")
    assert reread(ledger).job_id == "8", "as the job says"
    damage(attempt.folder / "run.8.0.json")
    assert [run.restart for run in reread(ledger).runs()] == [1]
    damage(attempt.folder / "end.json")
    assert reread(ledger).end is None and ledger.open_job(STAGE.id) is not None
    damage(attempt.folder / "intent.json")
    assert ledger.attempts_at(STAGE.id) == [] and ledger.begin(STAGE, **JOB).intent.number == 2, (
        "no number is given again"
    )


def test_stray_files_and_folders_are_no_attempts(ledger, attempt):
    folder = attempt.folder.parent
    for name in ("notes.txt", ".nfs0001", "²", "1.old"):
        (folder / name).write_text("")
    for name in ("backup", "-3", "007", "6"):
        (folder / name).mkdir()
    assert [found.intent for found in ledger.attempts_at(STAGE.id)] == [attempt.intent]
    assert ledger.begin(STAGE, **JOB).intent.number == 7


def test_what_can_not_be_read_now_is_not_absent(ledger, attempt, monkeypatch):
    """A disk or network error says nothing about what has been submitted."""

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "expired")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", refuse)
        with pytest.raises(PermissionError, match="expired"):
            reread(ledger)
    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    for read in (attempt.runs, attempt.logs, ledger.open_jobs):
        with pytest.raises(PermissionError, match="expired"):
            read()


def test_starts_are_in_order_whatever_the_clocks_of_their_nodes(attempt):
    attempt.record_run(Run("8", 0, "n4", 600.0, 601.0, "duplicate"))
    attempt.record_run(Run("7", 0, "n1", 900.0, 1000.0, "interrupted"))
    attempt.record_run(Run("7", 1, "n2", 400.0, 500.0, "interrupted"))
    attempt.record_run(Run("7", 10, "n3", 450.0, 550.0, "done"))
    assert [(run.job_id, run.restart) for run in attempt.runs()] == [("7", 0), ("7", 1), ("7", 10), ("8", 0)]


def test_a_job_that_is_over_loses_its_claim(ledger):
    handle = ledger.store.handle(STAGE.id)
    claim = handle.claim("7")
    handle.release_claim_of("8")
    assert claim.is_held()
    handle.release_claim_of("7")
    assert not claim.is_held() and handle.holder() is None


# What a report tells.


def told(ledger):
    found = past_attempts(ledger.store, STAGE.id, ledger.store.root / "logs")
    return [(past.number, past.state, past.started, past.ended, past.cause, past.where) for past in found]


def test_every_job_has_its_end(ledger):
    assert told(ledger) == []
    attempt = ledger.begin(STAGE, **JOB)
    assert told(ledger) == [(1, "open", None, None, "no end known", "job unknown")]
    attempt.record_run(Run("7", 0, "n1", 400.0))
    attempt.record_run(Run("7", 1, "n2", 200.0))
    assert told(ledger) == [(1, "open", 400.0, None, "no end known", "job 7 on n2, requeued 1 times")]
    attempt.close(End("bad node", "n2 is down", 390.0))
    second = ledger.begin(STAGE, **JOB)
    second.record_run(Run("8", 0, "n3", 300.0, 400.0, "done"))
    second.close(End("done", "", 401.0))
    assert told(ledger) == [
        (1, "failed", 400.0, 390.0, "bad node", "job 7 on n2, requeued 1 times"),
        (2, "done", 300.0, 401.0, "done", "job 8 on n3"),
    ]


def test_an_attempt_whose_end_no_launcher_saw_is_closed_by_whoever_sees_its_artifact(ledger, attempt):
    attempt.record_run(Run("7", 0, "n1", 100.0))
    with being_made(ledger.store, STAGE, finished=160.0) as draft:
        (draft / "result").touch()
    for _ in range(2):
        ledger.close_done(STAGE.id)
        assert (attempt.end.cause, attempt.end.at) == ("done", 160.0)
    assert ledger.open_jobs() == []


def test_attempts_on_this_machine_are_told_too(ledger):
    handle, logs = ledger.store.handle(STAGE.id), ledger.store.root / "logs"
    logs.mkdir()
    for number in (1, 2, 3):
        attempt = ledger.begin(STAGE, ranks=2)
        (logs / f"prune-{STAGE.fingerprint}.{number}.log").touch()
        if number == 1:
            attempt.close(End("input", "no such file", attempt.intent.created + 1))
    handle.work.mkdir(parents=True)
    Progress(handle.work).update("layers", 3, 4)
    found = past_attempts(ledger.store, STAGE.id, logs)
    assert [(past.state, past.cause) for past in found] == [
        ("failed", "input"),
        ("failed", "cut off"),
        ("open", "no end known"),
    ]
    assert found[2].message == "last sign of life: layers 3/4"
    assert [(past.number, len(past.logs)) for past in found] == [(1, 1), (2, 1), (3, 1)]
    with being_made(ledger.store, STAGE, attempts=3, finished=9.0, wall_time_s=1.0):
        pass
    assert past_attempts(ledger.store, STAGE.id, logs)[2].state == "done", "its launcher was killed before it said so"
    assert ledger.jobs_of(STAGE.id) == [] and ledger.open_jobs() == []


def test_of_a_long_log_only_the_end_is_read(tmp_path):
    (tmp_path / "log").write_bytes("caf\u00e9\nlast".encode())
    assert end_of_log(tmp_path / "log", 6) == "\ufffd\nlast" and end_of_log(tmp_path / "none", 6) == ""
