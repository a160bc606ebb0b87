"""Damaged and stray files among the records of attempts: none stops a launcher or hides a job that may be running."""

import errno
import json
import os
from dataclasses import replace

import pytest
from fake_slurm import FakeSlurm
from hfprune_launch.slurm import attempt_records
from hfprune_launch.slurm.attempt_records import End, Run
from hfprune_launch.slurm.attempts import Attempts
from hfprune_launch.slurm.backend import SlurmBackend
from hfprune_launch.slurm.causes import NOT_ACCEPTED
from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.slurm.profile import Profile, Resources
from hfprune_launch.slurm.status_table import stage_statuses
from hfprune_launch.slurm.submission import Submitting
from hfprune_launch.stage.stage_file import Provenance

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.cancellation import Cancellation
from hfprune_dist.store.stage import Input, Stage

STAGE = Stage("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})
DAMAGE = {
    "empty": b"",
    "half-written": b'{"stage_id": "prune/0',
    "null": b"null",
    "zeros": bytes(64),
    "another type": b"[1, 2]",
    "another content": b'{"a": 1}',
    "not UTF-8": b'{"a": "\xff"}',
}


@pytest.fixture
def attempts(tmp_path):
    return Attempts(tmp_path)


@pytest.fixture
def attempt(attempts):
    return attempts.begin(STAGE, 8, 64, 30, None)


def reread(attempts):
    return attempts.last(STAGE.id)


@pytest.fixture(params=DAMAGE)
def damage(request):
    return lambda file: file.write_bytes(DAMAGE[request.param])


def test_a_damaged_intent_of_a_job_that_may_run_is_no_room_for_another(attempts, attempt, damage):
    """Its id, or its name in the batch script, identifies the job; the rest of the intent is lost."""
    attempt.record_job("7")
    damage(attempt.folder / "intent.json")
    found = reread(attempts)
    assert found.job_id == "7" and found.end is None
    assert found.intent.job_name == attempt.intent.job_name
    assert (found.intent.stage_id, found.intent.number) == (STAGE.id, 1)
    assert abs(found.intent.created - attempt.intent.created) < 60


def test_a_job_of_an_older_version_is_known_by_its_script(attempts, attempt, damage):
    (attempt.folder / "job.json").write_text('{"job_id": "7", "at": 1.0}')
    (attempt.folder / "job.sh").write_text(f"#!/bin/bash\n#SBATCH --job-name={attempt.intent.job_name}\n")
    damage(attempt.folder / "intent.json")
    assert reread(attempts).intent.job_name == attempt.intent.job_name


@pytest.mark.parametrize("name", ["slot", "lane"])
def test_the_slot_of_a_job_that_an_earlier_version_submitted(attempts, name):
    """Jobs of both versions together stay within ``--max-running``."""
    attempt = attempts.begin(STAGE, 8, 64, 30, 3)
    record = json.loads((attempt.folder / "intent.json").read_text())
    record[name] = record.pop("slot")
    (attempt.folder / "intent.json").write_text(json.dumps(record))
    assert reread(attempts).intent == attempt.intent and attempt.intent.slot == 3


def test_a_damaged_intent_whose_script_may_have_been_submitted(attempts, attempt, damage):
    (attempt.folder / "job.sh").write_text(f"#!/bin/bash\n#SBATCH --job-name={attempt.intent.job_name}\n")
    damage(attempt.folder / "intent.json")
    found = reread(attempts)
    assert found.job_id is None and found.intent.job_name == attempt.intent.job_name


def test_a_damaged_intent_before_the_script_came_to_nothing(attempts, attempt, damage):
    damage(attempt.folder / "intent.json")
    assert reread(attempts) is None
    assert attempts.begin(STAGE, 8, 64, 30, None).intent.number == 2, "its number is not given again"


def test_a_damaged_intent_that_a_running_job_reads(attempts, attempt, damage):
    attempt.record_run(Run("7", 0, "n1", 1.0))
    damage(attempt.folder / "intent.json")
    found = attempts.attempt_at(attempt.folder).intent
    assert found.number == 1 and found.job_name and attempt.intent.job_name.startswith(found.job_name)
    assert reread(attempts).job_id == "7"


def test_a_damaged_job_id_is_found_in_the_jobs_own_record(attempts, attempt, damage):
    attempt.record_job("7")
    damage(attempt.folder / "job.json")
    assert reread(attempts).job_id is None, "to be found by name"
    attempt.record_run(Run("7", 0, "n1", 1.0))
    assert reread(attempts).job_id == "7"


def test_a_damaged_end_is_told_again(attempts, attempt, damage):
    attempt.record_job("7")
    attempt.close(End("killed", "", 1.0))
    damage(attempt.folder / "end.json")
    assert reread(attempts).end is None


def test_a_damaged_end_of_the_attempt_before(attempts, attempt, damage):
    attempt.record_run(Run("7", 0, "n1", 1.0))
    attempt.close(End("killed", "", 1.0, progress={"done": 3}))
    second = attempts.begin(STAGE, 8, 64, 30, None)
    assert second.earlier_progress() == [{"done": 3}]
    damage(attempt.folder / "end.json")
    assert second.earlier_progress() == []


def test_a_damaged_start_is_left_out(attempts, attempt, damage):
    attempt.record_run(Run("7", 0, "n1", 1.0))
    attempt.record_run(Run("7", 1, "n1", 2.0))
    damage(attempt.folder / "run.7.0.json")
    assert [run.restart for run in reread(attempts).runs()] == [1]


def test_records_of_a_later_version_are_read(attempts, attempt):
    record = json.loads((attempt.folder / "intent.json").read_text())
    (attempt.folder / "intent.json").write_text(json.dumps({**record, "something_new": 1}))
    assert reread(attempts).intent == attempt.intent


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


def test_records_that_are_being_written_are_no_hindrance(attempts, attempt, damage, monkeypatch):
    """A draft has its final name by the time it is looked at."""
    attempt.record_job("7")
    damage(attempt.folder / "intent.json")
    seen = attempt_records.listed
    monkeypatch.setattr(attempt_records, "listed", lambda folder, names: [*seen(folder, names), folder / ".draft"])
    assert reread(attempts).job_id == "7"


def test_starts_are_in_order_whatever_the_clocks_of_their_nodes(attempt):
    attempt.record_run(Run("7", 0, "n1", 900.0, 1000.0, "interrupted"))
    attempt.record_run(Run("7", 1, "n2", 400.0, 500.0, "interrupted"))
    attempt.record_run(Run("7", 10, "n3", 450.0, 550.0, "done"))
    attempt.record_run(Run("8", 0, "n4", 600.0, 601.0, "duplicate"))
    assert [(run.job_id, run.restart) for run in attempt.runs()] == [("7", 0), ("7", 1), ("7", 10), ("8", 0)]


@pytest.mark.parametrize("cause", NOT_ACCEPTED)
def test_a_job_that_was_not_accepted_is_recorded_as_it_is_submitted_at_last(attempts, attempt, cause):
    """With the resources and the time limit of the profile of then, whose hours are counted and told."""
    attempt.close(End(cause, "", 1.0))
    asked = {"cluster": "c", "user": "u", "ranks": 12}
    again = attempts.begin(STAGE, 16, 96, 720, 1, **asked)
    intent = reread(attempts).intent
    assert (
        intent
        == again.intent
        == replace(attempt.intent, created=intent.created, gpus=16, cores=96, time_minutes=720, slot=1, **asked)
    )
    assert reread(attempts).end is None and len(attempts.of(STAGE.id)) == 1


def cut(file):
    file.write_bytes(file.read_bytes()[:20])


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return FakeSlurm(tmp_path / "slurm").on_path(monkeypatch)


@pytest.fixture
def launch(tmp_path):
    """Return a function that starts a launcher and returns its messages."""

    def start():
        store, told = Store(tmp_path), []
        profile = Profile("test", {STAGE.kind: Resources()}, None)
        submitting = Submitting(
            Provenance(RuntimeConfig(), {}, {}), profile, tmp_path / "code", None, Cancellation(tmp_path)
        )
        commands = SlurmCommands(sleep=lambda _: None)
        SlurmBackend(store, Plan({STAGE.id: STAGE}, (), (STAGE.id,)), submitting, commands, told.append).start()
        stage_statuses(Plan({STAGE.id: STAGE}, (), (STAGE.id,)), store, commands.jobs())
        return [event.what for event in told]

    return start


@pytest.mark.parametrize(
    "lost", [["intent.json"], ["intent.json", "job.json"], ["intent.json", "job.sh"], ["job.json"]]
)
def test_a_job_behind_damaged_records_is_followed(fake, launch, attempts, lost):
    launch()
    fake.set_state("101", "RUNNING")
    for name in lost:
        cut(attempts.last(STAGE.id).folder / name)
    assert "submitted" not in launch()
    assert len(fake.calls("sbatch")) == 1 and attempts.last(STAGE.id).job_id == "101"


def test_a_job_of_which_only_the_id_is_left_is_followed(fake, launch, attempts):
    launch()
    fake.set_state("101", "RUNNING")
    folder = attempts.last(STAGE.id).folder
    (folder / "job.json").write_text('{"job_id": "101", "at": 1.0}')
    cut(folder / "intent.json")
    cut(folder / "job.sh")
    launch()
    assert len(fake.calls("sbatch")) == 1


def test_a_job_that_is_over_behind_damaged_records_makes_room(fake, launch, attempts):
    launch()
    fake.set_state("101", "FAILED")
    cut(attempts.last(STAGE.id).folder / "intent.json")
    assert launch() == ["ended", "submitted"]


def test_an_end_that_is_damaged_is_told_again_and_the_stage_goes_on(fake, launch, attempts):
    launch()
    fake.set_state("101", "FAILED")
    assert launch() == ["ended", "submitted"]
    fake.set_state("102", "FAILED")
    assert launch() == ["ended", "submitted"]
    for number in (1, 2):
        cut(attempts.of(STAGE.id)[number - 1].folder / "end.json")
    launch()
    assert len(fake.calls("sbatch")) == 3
