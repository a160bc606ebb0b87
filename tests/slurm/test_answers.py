"""Commands of Slurm that answer badly, and jobs that can't start, on real daemons."""

import os
import shutil
import subprocess
import time

import pytest
from clusters import (
    CONTROL,
    DENSE,
    PRUNE,
    SLOWLY,
    Submitted,
    attempt_folders,
    causes,
    done,
    job_names,
    read,
    slurm,
    wait_for,
)
from sweeps import sweep

pytestmark = pytest.mark.slurm

# In turns: the truth, nothing, a list without jobs, one that is cut off within a line.
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


@pytest.fixture(autouse=True)
def _needs_a_cluster(cluster):
    """Skips or fails before anything slow where there is no cluster."""


@pytest.fixture
def path_with(tmp_path):
    """Makes a PATH that begins with shims for commands of Slurm."""

    def path(name, **shims):
        folder = tmp_path / name
        folder.mkdir()
        for command, text in shims.items():
            (folder / command).write_text(text.format(folder=folder, real=shutil.which(command)))
            (folder / command).chmod(0o755)
        return f"{folder}:{os.environ['PATH']}"

    return path


def test_squeue_and_sbatch_answer_badly(cluster, config, finished, without, path_with):
    """Beside each other: with accounting, without it, and with an sbatch that says no id."""
    bad = {
        "accounting": {"squeue": SQUEUE, "sbatch": SBATCH},
        "none": {"squeue": SQUEUE, "sbatch": SBATCH, "sacct": NO_ACCOUNTING},
        "silent": {"squeue": SQUEUE, "sbatch": SILENT_SBATCH, "sacct": NO_ACCOUNTING},
    }
    stages = {"accounting": CONTROL, "none": DENSE, "silent": "evaluate alpha 0.2 + lora"}
    sweeps = {}
    for name, shims in bad.items():
        environment = {**SLOWLY, "PATH": path_with(name, **shims), "SQUEUE_PARTITION": "urgent"}
        sweeps[name] = Submitted(config, without(stages[name]), **environment)
    for submitted in sweeps.values():
        done(cluster, submitted.out, finished, submitted)
        assert causes(submitted.out) == ["done"]


def test_a_need_is_forgotten_during_a_submission(cluster, config, finished, without):
    """As if the submission took longer than MinJobAge: Slurm knows the job of a need no more."""
    out = without(PRUNE, "recover alpha 0.2", "evaluate alpha 0.2")
    marker = out / "forgotten"
    sbatch = f"""#!/bin/bash
if grep -q afterok "${{@: -1}}" && [ ! -e {marker} ]; then
    touch {marker}
    job=$(sed -n 's/.*afterok:\\([0-9]*\\).*/\\1/p' "${{@: -1}}")
    while [ ! -e {out}/store/prune/*/manifest.json ]; do sleep 0.2; done
    sed -i "s/afterok:$job/afterok:999999/" "${{@: -1}}"
fi
{{real}} "$@"
"""
    text = sbatch.replace("{real}", shutil.which("sbatch"))
    folder = out / "bin"
    folder.mkdir()
    (folder / "sbatch").write_text(text)
    (folder / "sbatch").chmod(0o755)
    submitted = Submitted(config, out, PATH=f"{folder}:{os.environ['PATH']}")
    output = done(cluster, out, finished, submitted)
    assert "refused" not in output and set(causes(out)) == {"done"}


def test_cancel_finds_jobs_outside_the_plan(cluster, config, finished, without):
    slurm("scontrol", "update", "partitionname=main", "state=down")
    try:
        out = without(CONTROL, DENSE)
        code, output = Submitted(config, out, "--no-follow").end()
        assert code == 0, output
        _, other = attempt_folders(out)
        (other / "job.json").unlink()
        result = sweep(config, out, "--models", "beta", "--ratios", "0.3", "--cancel")
        assert "cancelled 2 jobs" in result.stdout, result.stdout
        wait_for(lambda: not cluster.states(job_names(out)), 30)
    finally:
        slurm("scontrol", "update", "partitionname=main", "state=up")


def test_a_prolog_fails(cluster, config, finished, without, tmp_path):
    """Slurm holds the job for ever, and drains the node."""
    conf, prolog = cluster.folder / "slurm.conf", tmp_path / "prolog"
    before = conf.read_text()
    prolog.write_text('#!/bin/bash\n[ "$SLURMD_NODENAME" != n1 ]\n')
    prolog.chmod(0o755)
    conf.write_text(f"{before}Prolog={prolog}\n")
    slurm("scontrol", "reconfigure")
    try:
        out = without(DENSE)
        output = done(cluster, out, finished, Submitted(config, out))
        assert "launch failed requeued held" in output and "could not be started on n1" in output
        assert causes(out) == ["bad node", "done"]
        assert read(attempt_folders(out)[0] / "end.json")["bad_nodes"] == ["n1"]
    finally:
        conf.write_text(before)
        slurm("scontrol", "reconfigure")
        subprocess.run(["scontrol", "update", "nodename=n1", "state=resume"], check=False)
        cluster.run("up")


def test_why_a_job_waits_is_said(cluster, config, finished, without):
    slurm("scontrol", "update", "partitionname=main", "state=down")
    try:
        out = without(DENSE)
        submitted = Submitted(config, out)
        wait_for(lambda: "PartitionDown" in slurm("squeue", "--noheader", "--format=%r"))
        wait_for(lambda: attempt_folders(out) and (attempt_folders(out)[0] / "job.json").exists())
        status = sweep(config, out, "--models", "alpha", "--ratios", "0.2", "--status").stdout
        assert "queued" in status
        time.sleep(5)  # the launcher's next look at its jobs, of which nothing is seen from outside
    finally:
        slurm("scontrol", "update", "partitionname=main", "state=up")
    output = done(cluster, out, finished, submitted)
    assert output.count("1 job can't start: PartitionDown") == 1
