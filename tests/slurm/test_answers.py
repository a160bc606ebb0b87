"""Slurm commands that answer badly, and a job that can't start, on real daemons."""

import os
import shutil

import pytest
from clusters import (
    DENSE,
    FORKED_RANKS,
    SLOWLY,
    causes,
    done,
)

pytestmark = [pytest.mark.slurm, pytest.mark.beside, pytest.mark.thorough]

# In turn: the truth, nothing, a list without jobs, a list cut off within a line.
SQUEUE = """#!/bin/bash
turn=$(( $(cat {folder}/turn 2>/dev/null || echo 0) + 1 ))
echo $turn >{folder}/turn
[ -z "$SQUEUE_PARTITION" ] || exit 0
case $((turn % 4)) in
    0) exit 0 ;;
    1) {real} "$@" ;;
    2) {real} "$@" | head -n 1 ;;
    3) {real} "$@" | head -c -20 ;;
esac
"""
SBATCH = """#!/bin/bash
echo "Note: maintenance on Friday"
{real} "$@"
echo "Note: your 12 core-hours are used up"
"""


def path_with(folder, **shims):
    """Return a PATH that begins with a new folder of shims for Slurm's commands."""
    folder.mkdir()
    for command, text in shims.items():
        (folder / command).write_text(text.replace("{folder}", str(folder)).replace("{real}", shutil.which(command)))
        (folder / command).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def test_squeue_and_sbatch_answer_badly(cluster, config, finished, without):
    out, shims = without(DENSE), {"squeue": SQUEUE, "sbatch": SBATCH}
    path = path_with(out / "bin", **shims)
    submitted = cluster.submit(config, out, **SLOWLY, **FORKED_RANKS, PATH=path, SQUEUE_PARTITION="urgent")
    done(cluster, out, finished, submitted)
    assert causes(out) == ["done"]


@pytest.mark.beside("disturbed")
def test_a_prolog_fails(disturbed, config, finished, without):
    """Slurm holds the job indefinitely, and drains the node."""
    broken = disturbed.folder / "prolog.fails.n1"
    broken.touch()
    try:
        out = without(DENSE)
        output = done(disturbed, out, finished, disturbed.submit(config, out, **FORKED_RANKS))
        assert "could not be started and would have waited for ever: launch failed requeued held" in output
        assert causes(out) == ["bad node", "done"]
    finally:
        broken.unlink()
        disturbed.slurm("scontrol", "update", "nodename=n1", "state=resume")
