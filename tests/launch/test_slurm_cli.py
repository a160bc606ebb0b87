import pytest
from fake_slurm import FakeSlurm

from launch.slurm_cli import (
    RETRY_DELAYS_S,
    SlurmCommands,
    SlurmUnavailableError,
    SubmissionRefusedError,
    SubmitLimitError,
)

BUSY = "sbatch: error: Batch job submission failed: Socket timed out on send/recv operation"
DOWN = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return FakeSlurm(tmp_path / "slurm").on_path(monkeypatch)


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "job.sh"
    file.write_text("#!/bin/bash\n#SBATCH --job-name=a-name\n")
    return file


@pytest.fixture
def slept():
    return []


@pytest.fixture
def slurm(slept):
    return SlurmCommands(sleep=slept.append)


def test_submit_returns_the_id(fake, slurm, script):
    assert slurm.submit(script, "a-name") == "101"


def test_a_busy_controller_is_asked_again_with_growing_delays(fake, slurm, script, slept):
    fake.fail_next("sbatch", BUSY, BUSY, BUSY)
    assert slurm.submit(script, "a-name") == "101"
    assert slept == list(RETRY_DELAYS_S[:3])


def test_a_submission_that_arrived_in_spite_of_an_error_is_not_repeated(fake, slurm, script):
    (fake.folder / "arrived.fail").write_text(BUSY)
    assert slurm.submit(script, "a-name") == "101"
    assert len(fake.jobs()) == 1 and len(fake.calls("sbatch")) == 1


def test_a_refusal_says_why_and_is_not_repeated(fake, slurm, script, slept):
    fake.fail_next("sbatch", "sbatch: error: invalid partition specified: nowhere")
    with pytest.raises(SubmissionRefusedError, match=r"invalid partition specified: nowhere.*check the profile"):
        slurm.submit(script, "a-name")
    assert slept == []


POLICY = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size "
    "and/or time limits)"
)


@pytest.mark.parametrize("named", ["QOSMaxSubmitJobPerUserLimit", "AssocGrpSubmitJobsLimit", ""])
def test_a_full_queue_is_no_refusal(fake, slurm, script, named):
    fake.fail_next("sbatch", f"sbatch: error: {named} {POLICY}")
    with pytest.raises(SubmitLimitError):
        slurm.submit(script, "a-name")


@pytest.mark.parametrize("named", ["QOSMaxWallDurationPerJobLimit", "AssocMaxNodePerJobLimit"])
def test_a_job_beyond_other_limits_is_refused(fake, slurm, script, named):
    """Slurm explains all of them with the same sentence."""
    fake.fail_next("sbatch", f"sbatch: error: {named} {POLICY}")
    with pytest.raises(SubmissionRefusedError, match=named):
        slurm.submit(script, "a-name")


def test_a_controller_that_stays_away(fake, slurm, script, slept):
    fake.fail_next("squeue", *[DOWN] * 20)
    with pytest.raises(SlurmUnavailableError, match="Unable to contact"):
        slurm.jobs()
    assert slept == list(RETRY_DELAYS_S)


def test_jobs_are_parsed(fake, slurm):
    (fake.folder / "jobs").write_text(
        "7|RUNNING|None|n[1-2]|2026-01-01T00:00:00|N/A|a|strange|name\n8|NODE_FAIL|NodeDown|n3|N/A|N/A|other\n\n"
    )
    jobs = slurm.jobs()
    assert jobs["7"].is_live and jobs["7"].nodes == "n[1-2]" and jobs["7"].name == "a|strange|name"
    assert not jobs["8"].is_live
    assert len(fake.calls("squeue")) == 1


def test_history_is_empty_without_accounting(fake, slurm):
    fake.fail_next("sacct", "Slurm accounting storage is disabled")
    assert slurm.history(["7"]) == {}
    (fake.folder / "history").write_text("7|CANCELLED by 1000|None|n1|2026-01-01T00:00:00|2026-01-01T00:01:00|name\n")
    assert slurm.history(["7"])["7"].state == "CANCELLED"
    assert slurm.history([]) == {} and len(fake.calls("sacct")) == 2


def test_cancelling_what_has_ended_is_no_error(fake, slurm):
    fake.fail_next("scancel", "scancel: error: Kill job error on job id 7: Invalid job id specified")
    slurm.cancel(["7"])
    slurm.cancel([])
    assert fake.calls("scancel") == ["scancel 7"]


@pytest.mark.parametrize(
    ("state", "requeued", "queued"), [("RUNNING", 1, True), ("PENDING", 0, True), ("CANCELLED", 0, False)]
)
def test_a_job_requeues_itself_unless_slurm_does_or_the_user_has_cancelled_it(fake, slurm, state, requeued, queued):
    (fake.folder / "job").write_text(f"JobId=7 JobName=x JobState={state} Reason=None\n")
    assert slurm.requeue("7_1") is queued
    assert fake.calls("scontrol requeue") == ["scontrol requeue 7_1"] * requeued
