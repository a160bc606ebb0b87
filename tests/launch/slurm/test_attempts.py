"""The records of attempts, of which some may be damaged or strange."""

import errno
import os
from dataclasses import replace

import pytest
from hfprune_launch.slurm.attempt_records import End, Run
from hfprune_launch.slurm.attempts import Attempts
from made_stages import stage_of

from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})


@pytest.fixture
def attempts(tmp_path):
    return Attempts(tmp_path)


@pytest.fixture
def attempt(attempts):
    return attempts.begin(STAGE, 8, 64, 30, None)


def reread(attempts):
    return attempts.last(STAGE.id)


def damage(file):
    file.write_bytes(file.read_bytes()[:20])


def test_an_attempt_whose_intent_is_damaged_is_none_and_its_number_is_not_given_again(attempts, attempt):
    damage(attempt.folder / "intent.json")
    assert reread(attempts) is None and attempts.begin(STAGE, 8, 64, 30, None).intent.number == 2


def test_a_damaged_job_id_is_found_in_the_jobs_own_record(attempts, attempt):
    attempt.record_job("7")
    damage(attempt.folder / "job.json")
    assert reread(attempts).job_id is None, "to be found by name"
    attempt.record_run(Run("7", 0, "n1", 1.0))
    assert reread(attempts).job_id == "7"


def test_a_damaged_end_is_told_again(attempts, attempt):
    attempt.record_job("7")
    attempt.close(End("killed", "", 1.0))
    damage(attempt.folder / "end.json")
    assert reread(attempts).end is None


def test_a_damaged_end_of_the_attempt_before(attempts, attempt):
    attempt.record_run(Run("7", 0, "n1", 1.0))
    attempt.close(End("killed", "", 1.0, progress={"done": 3}))
    second = attempts.begin(STAGE, 8, 64, 30, None)
    assert second.earlier_progress() == [{"done": 3}]
    damage(attempt.folder / "end.json")
    assert second.earlier_progress() == []


def test_a_damaged_start_is_left_out(attempts, attempt):
    attempt.record_run(Run("7", 0, "n1", 1.0))
    attempt.record_run(Run("7", 1, "n1", 2.0))
    damage(attempt.folder / "run.7.0.json")
    assert [run.restart for run in reread(attempts).runs()] == [1]


def test_stray_files_and_folders_are_no_attempts(attempts, attempt):
    folder = attempt.folder.parent
    for name in ("notes.txt", ".nfs0001", "4", "²", "1.old"):
        (folder / name).write_text("")
    for name in ("backup", "-3", "007", "6"):
        (folder / name).mkdir()
    (folder / "6" / "intent.json").mkdir()
    assert [found.intent for found in attempts.of(STAGE.id)] == [attempt.intent]
    assert attempts.begin(STAGE, 8, 64, 30, None).intent.number == 7


def test_a_record_that_can_not_be_read_now_is_not_absent(attempts, attempt, monkeypatch):
    """A disk or network error says nothing about what has been submitted."""
    from pathlib import Path

    def refuse(file, **_):
        raise OSError(5, "Input/output error", str(file))

    monkeypatch.setattr(Path, "read_text", refuse)
    with pytest.raises(OSError, match="Input/output"):
        reread(attempts)


def test_a_folder_that_can_not_be_listed_now_is_not_empty(attempts, attempt, monkeypatch):
    """As if its job had never started, or no job had been submitted."""
    attempt.record_run(Run("7", 0, "n1", 1.0))

    def refuse(*_):
        raise PermissionError(errno.EACCES, "expired")

    monkeypatch.setattr(os, "listdir", refuse)
    monkeypatch.setattr(os, "scandir", refuse)
    for read in (attempt.runs, attempt.logs, attempts.open_attempts):
        with pytest.raises(PermissionError, match="expired"):
            read()


def test_starts_are_in_order_whatever_the_clocks_of_their_nodes(attempt):
    attempt.record_run(Run("7", 0, "n1", 900.0, 1000.0, "interrupted"))
    attempt.record_run(Run("7", 1, "n2", 400.0, 500.0, "interrupted"))
    attempt.record_run(Run("7", 10, "n3", 450.0, 550.0, "done"))
    attempt.record_run(Run("8", 0, "n4", 600.0, 601.0, "duplicate"))
    assert [(run.job_id, run.restart) for run in attempt.runs()] == [("7", 0), ("7", 1), ("7", 10), ("8", 0)]


def test_a_job_that_was_not_accepted_is_recorded_as_it_is_submitted_at_last(attempts, attempt):
    """With the resources and the time limit of the profile of then, whose hours are counted and told."""
    attempt.close(End("not accepted", "", 1.0))
    again = attempts.begin(STAGE, 16, 96, 720, 1, ranks=12)
    intent = reread(attempts).intent
    assert (
        intent
        == again.intent
        == replace(attempt.intent, created=intent.created, gpus=16, cores=96, time_minutes=720, slot=1, ranks=12)
    )
    assert reread(attempts).end is None and len(attempts.of(STAGE.id)) == 1
