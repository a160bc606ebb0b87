import os
import re

import pytest
from fake_slurm import HEADER, Job
from hfprune_launch.slurm import commands
from hfprune_launch.slurm.commands import (
    DELAYS_S,
    NotNowError,
    SlurmCommands,
    SlurmUnavailableError,
    SubmissionRefusedError,
    command_environment,
)


@pytest.fixture
def script(tmp_path):
    file = tmp_path / "job.sh"
    file.write_text("#!/bin/bash\n#SBATCH --job-name=a-name\n#SBATCH --comment=a-name\n")
    return file


@pytest.fixture
def slept():
    return []


@pytest.fixture
def slurm(slept):
    return SlurmCommands(sleep=slept.append)


REFUSED = "sbatch: error: Batch job submission failed:"
POLICY = f"{REFUSED} Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)"


@pytest.mark.parametrize(
    ("says", "error"),
    [
        ("sbatch: error: invalid partition specified: zero_bytes", SubmissionRefusedError),  # a name sounds busy
        (f"{REFUSED} Socket timed out on send/recv operation", SlurmUnavailableError),
        (f"sbatch: error: QOSMaxSubmitJobPerUserLimit\n{POLICY}", NotNowError),
        (f"sbatch: error: QOSMaxWallDurationPerJobLimit {POLICY}", SubmissionRefusedError),  # explained as the same
        (f"{REFUSED} Job dependency problem", NotNowError),
        (f"sbatch: error: no account; set one and try again\n{REFUSED} Unspecified error", SubmissionRefusedError),
    ],
)
def test_whether_a_job_is_refused_for_now_or_for_good(fake, slurm, script, slept, says, error):
    fake.fail_next("sbatch", says)
    with pytest.raises(error, match=re.escape(says.splitlines()[0])):
        slurm.submit(script)
    assert slept == []


def test_the_id_is_found_among_a_sites_notes(fake, slurm, script):
    fake.answer = "your 12 core-hours are used up\nID;hfprune\nNote: 3 of your jobs wait\n"
    assert slurm.submit(script) == "101"


@pytest.mark.parametrize("answer", ["", f"{HEADER}7|RUNNING|None|n1|na", f"{HEADER}12", HEADER[:20]])
def test_an_answer_that_is_cut_off_is_none(fake, slurm, slept, answer):
    fake.jobs = {"7": Job("a|strange|name", "RUNNING", nodes="n[1-2]"), "8": Job("other", "NODE_FAIL", "NodeDown")}
    fake.listings = [answer, answer]
    jobs = slurm.jobs()
    assert jobs["a|strange|name"].is_live and jobs["a|strange|name"].nodes == "n[1-2]" and not jobs["other"].is_live
    assert slept == list(DELAYS_S[:2])
    fake.fail_next("squeue", *["error"] * 20)
    with pytest.raises(SlurmUnavailableError, match="Unable to contact"):
        slurm.jobs()
    assert slept[2:] == list(DELAYS_S)


def test_commands_do_not_see_what_a_user_set_for_them_and_are_heard(slurm, script, tmp_path, monkeypatch):
    kept = {"SLURM_CONF": "/etc/slurm.conf", "SLURM_CLUSTERS": "a", "SLURM_JWT": "token", "PATH": "/bin", "HOME": "/"}
    dropped = ["SQUEUE_PARTITION", "SLURM_TIME_FORMAT", "SBATCH_QOS", "SCANCEL_STATE", "SLURM_JOB_ID", "SRUN_NTASKS"]
    assert command_environment({**kept, **dict.fromkeys(dropped, "x")}) == kept
    (tmp_path / "squeue").write_text(f'#!/bin/bash\nprintf "{HEADER[:-1]}\\n1|R||||$SQUEUE_PARTITION|;\\n"\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("SQUEUE_PARTITION", "urgent")
    assert [*slurm.jobs()] == [""]
    (tmp_path / "squeue").rename(tmp_path / "sbatch").write_text("#!/bin/bash\necho Job queue full >&2\nexec sleep 9")
    monkeypatch.setattr(commands, "COMMAND_TIMEOUT_S", 1.0)
    with pytest.raises(NotNowError, match="queue full; sbatch: timed out after 1 s; the rest is submitted"):
        slurm.submit(script)  # what a command said before it took too long counts
