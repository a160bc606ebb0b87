import os

import pytest
from fake_slurm import HEADER, Controller, Job
from hfprune_launch.slurm.commands import (
    DELAYS_S,
    NotNowError,
    SlurmCommands,
    SlurmUnavailableError,
    SubmissionRefusedError,
    command_environment,
)

DOWN = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"


@pytest.fixture
def fake(monkeypatch):
    return Controller().install(monkeypatch)


@pytest.fixture
def squeue(tmp_path, monkeypatch):
    """Return a function that makes a program squeue of shell lines."""

    def make(lines):
        (tmp_path / "squeue").write_text(f"#!/bin/bash\n{lines}\n")
        (tmp_path / "squeue").chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    return make


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


def test_a_refusal_says_why_and_is_not_repeated(fake, slurm, script, slept):
    """Names that a refusal repeats may sound like a busy controller."""
    fake.fail_next("sbatch", "sbatch: error: invalid partition specified: zero_bytes")
    with pytest.raises(SubmissionRefusedError, match="invalid partition specified: zero_bytes"):
        slurm.submit(script)
    assert slept == []


@pytest.mark.parametrize("said", ["Slurm backup controller in standby mode", "Socket timed out on send/recv operation"])
def test_what_slurm_says_while_it_does_not_answer_is_no_refusal(fake, slurm, script, said):
    fake.fail_next("sbatch", f"sbatch: error: Batch job submission failed: {said}")
    with pytest.raises(SlurmUnavailableError, match=said):
        slurm.submit(script)


POLICY = (
    "sbatch: error: Batch job submission failed: Job violates accounting/QOS policy (job submit limit, user's size "
    "and/or time limits)"
)


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{POLICY}", "QOSMaxSubmitJobPerUserLimit; .*QOS policy"),
        ("sbatch: error: Batch job submission failed: Job dependency problem", "Job dependency problem; tried again"),
    ],
)
def test_a_job_that_slurm_takes_later_is_no_refusal(fake, slurm, script, refusal, message):
    fake.fail_next("sbatch", refusal)
    with pytest.raises(NotNowError, match=message):
        slurm.submit(script)


def test_a_job_beyond_other_limits_is_refused(fake, slurm, script):
    """Slurm gives the same explanation for all of them."""
    fake.fail_next("sbatch", f"sbatch: error: QOSMaxWallDurationPerJobLimit {POLICY}")
    with pytest.raises(SubmissionRefusedError, match="QOSMaxWallDurationPerJobLimit"):
        slurm.submit(script)


def test_a_controller_that_stays_away(fake, slurm, script, slept):
    fake.fail_next("squeue", *[DOWN] * 20)
    with pytest.raises(SlurmUnavailableError, match="Unable to contact"):
        slurm.jobs()
    assert slept == list(DELAYS_S)


def test_jobs_are_parsed(fake, slurm):
    fake.jobs = {"7": Job("a|strange|name", "RUNNING", nodes="n[1-2]"), "8": Job("other", "NODE_FAIL", "NodeDown")}
    jobs = slurm.jobs()
    assert jobs["a|strange|name"].is_live and jobs["a|strange|name"].nodes == "n[1-2]" and not jobs["other"].is_live
    assert len(fake.calls("squeue")) == 1


def test_the_id_is_found_among_a_sites_notes(fake, slurm, script):
    fake.answer = "your 12 core-hours are used up\nID;hfprune\nNote: 3 of your jobs wait\n"
    assert slurm.submit(script) == "101"
    assert fake.calls("squeue") == []


@pytest.mark.parametrize("answer", ["", f"{HEADER}7|RUNNING|None|n1|na", f"{HEADER}12", HEADER[:20]])
def test_an_answer_that_is_cut_off_is_none(fake, slurm, slept, answer):
    fake.jobs["7"] = Job("name", "RUNNING", nodes="n1")
    fake.listings = [answer, answer]
    assert list(slurm.jobs()) == ["name"]
    assert slept == list(DELAYS_S[:2])


def test_commands_do_not_see_what_a_user_set_for_them(slurm, squeue, monkeypatch):
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "a", "SLURM_JWT": "token", "PATH": "/bin", "HOME": "/"}
    dropped = ["SQUEUE_PARTITION", "SLURM_TIME_FORMAT", "SLURM_MEM_PER_CPU", "SBATCH_QOS"]
    dropped += ["SCANCEL_STATE", "SINFO_FORMAT", "SLURM_JOB_ID", "SRUN_CPUS_PER_TASK"]
    assert command_environment({**kept, **dict.fromkeys(dropped, "x")}) == kept
    squeue(f'printf "{HEADER[:-1]}\\n1|R|||$SQUEUE_PARTITION|;\\n"')
    monkeypatch.setenv("SQUEUE_PARTITION", "urgent")
    assert [*slurm.jobs()] == [""]
