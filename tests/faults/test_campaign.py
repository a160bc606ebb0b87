"""Power losses at drawn moments of every kind of run; all of them with --all (see faults.campaign)."""

import json
import os
import subprocess
import sys

import pytest
from fork_server import forked
from ranks import FAULTS, ROOT

pytestmark = pytest.mark.slow

SUBJECTS = ["commit", "slurm", "sweep"]
# States per subject.
DRAWN = 3
# Subjects that must end badly, because one fsync is left out.
BROKEN = ["commit!b.bin"]


@pytest.fixture(scope="module")
def reports(request, tmp_path_factory):
    file = tmp_path_factory.mktemp("campaign") / "reports.json"
    draw = 0 if request.config.option.all else DRAWN
    subprocess.run(
        forked([sys.executable, FAULTS / "campaign.py", file, str(draw), *SUBJECTS, *BROKEN]),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
        stdout=subprocess.DEVNULL,
        check=False,
    )
    return json.loads(file.read_text())


@pytest.mark.parametrize("subject", SUBJECTS)
def test_after_any_crash_the_same_command_ends_with_the_same_bits(reports, subject):
    assert reports[subject]["failures"] == []
    assert reports[subject]["run"] >= DRAWN


@pytest.mark.parametrize("subject", BROKEN)
def test_a_missing_fsync_would_be_found(reports, subject):
    assert reports[subject]["failures"]
