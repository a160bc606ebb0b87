"""Slurm commands that answer badly, and jobs that can't start, on real daemons."""

import os
import shutil
import time

import pytest
from clusters import (
    CONTROL,
    DENSE,
    FORKED_RANKS,
    PRUNE,
    SLOWLY,
    attempt_folders,
    causes,
    done,
    job_names,
    read,
    wait_for,
)

pytestmark = [pytest.mark.slurm, pytest.mark.beside]

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
SILENT_SBATCH = """#!/bin/bash
{real} "$@" >/dev/null
"""
NO_ACCOUNTING = """#!/bin/bash
echo "Slurm accounting storage is disabled" >&2
exit 1
"""


def causes_so_far(out):
    ends = [folder / "end.json" for folder in attempt_folders(out)]
    return [read(end)["cause"] if end.exists() else None for end in ends]


def path_with(folder, **shims):
    """Return a PATH that begins with a new folder of shims for Slurm's commands."""
    folder.mkdir()
    for command, text in shims.items():
        (folder / command).write_text(text.replace("{folder}", str(folder)).replace("{real}", shutil.which(command)))
        (folder / command).chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


@pytest.mark.parametrize(
    "missing, shims",
    [
        (DENSE, {"squeue": SQUEUE, "sbatch": SBATCH, "sacct": NO_ACCOUNTING}),
        ("evaluate alpha 0.2 + lora", {"squeue": SQUEUE, "sbatch": SILENT_SBATCH, "sacct": NO_ACCOUNTING}),
    ],
    ids=["without accounting", "without the id of the job"],
)
def test_squeue_and_sbatch_answer_badly(cluster, config, finished, without, missing, shims):
    out = without(missing)
    path = path_with(out / "bin", **shims)
    submitted = cluster.submit(config, out, **SLOWLY, **FORKED_RANKS, PATH=path, SQUEUE_PARTITION="urgent")
    done(cluster, out, finished, submitted)
    assert causes(out) == ["done"]


def test_a_held_job_that_waits_for_another_is_cancelled(cluster, config, without):
    profile = cluster.partition("held", nodes="n1", state="down")
    out = without(PRUNE, "recover alpha 0.2")
    submitted = cluster.submit(config, out, profile=profile)
    wait_for(lambda: len(cluster.states(job_names(out))) == 2)
    wait_for(lambda: (attempt_folders(out)[1] / "job.json").exists())
    dependent = read(attempt_folders(out)[1] / "job.json")["job_id"]
    cluster.slurm("scontrol", "hold", dependent)
    wait_for(lambda: "JobHeld" in cluster.slurm("squeue", "--noheader", f"--jobs={dependent}", "--format=%r"))
    cluster.slurm("scancel", dependent)
    wait_for(lambda: (attempt_folders(out)[1] / "end.json").exists())
    assert causes_so_far(out) == [None, "cancelled"]
    assert "cancelled 1 job" in cluster.sweep(config, out, "--cancel")
    code, output = submitted.end()
    assert code == 1 and causes(out) == ["cancelled", "cancelled"], output


def test_a_launcher_that_waits_for_room_is_cancelled(cluster, config, finished, without):
    """The second job is one more than Slurm allows."""
    profile = cluster.partition("room", nodes="n[1-2]", state="down")
    out = without(CONTROL, DENSE)
    sbatch = """#!/bin/bash
[ -z "$(squeue --noheader --partition=room)" ] ||
    { touch {folder}/full; echo "error: AssocMaxSubmitJobLimit" >&2; exit 1; }
{real} "$@"
"""
    path = path_with(out / "bin", sbatch=sbatch)
    submitted = cluster.submit(config, out, profile=profile, PATH=path)
    wait_for((out / "bin" / "full").exists)
    assert "cancelled 1 job" in cluster.sweep(config, out, "--cancel")
    code, output = submitted.end()
    assert code == 1 and "cancelled: by another command, so nothing more is submitted" in output, output
    assert not cluster.states(job_names(out)) and causes(out) == ["cancelled"]
    cluster.slurm("scontrol", "update", "partitionname=room", "state=up")
    done(cluster, out, finished, cluster.submit(config, out, profile=profile, **FORKED_RANKS))


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
        assert read(attempt_folders(out)[0] / "end.json")["bad_nodes"] == ["n1"]
    finally:
        broken.unlink()
        disturbed.slurm("scontrol", "update", "nodename=n1", "state=resume")


def test_why_a_job_waits_is_said(cluster, config, finished, without):
    profile = cluster.partition("later", nodes="n[1-2]", state="down")
    out = without(DENSE)
    submitted = cluster.submit(config, out, profile=profile, **FORKED_RANKS)
    wait_for(lambda: "PartitionDown" in cluster.slurm("squeue", "--noheader", "--partition=later", "--format=%r"))
    wait_for(lambda: attempt_folders(out) and (attempt_folders(out)[0] / "job.json").exists())
    assert "queued" in cluster.sweep(config, out, "--status")
    time.sleep(5)  # the launcher's next look at its jobs, which can't be seen from outside
    cluster.slurm("scontrol", "update", "partitionname=later", "state=up")
    output = done(cluster, out, finished, submitted)
    assert output.count("it can't start: PartitionDown") == 1
