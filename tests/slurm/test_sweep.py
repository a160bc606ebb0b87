"""A sweep on the cluster, a rank of which is killed: the same results as on this machine; and commands that inspect it,
inside another job. If every test is asked for, also a whole sweep of processes that are no forks.
"""

import re
import signal
from pathlib import Path

import pytest
from clusters import (
    CELL,
    CONTROL,
    CONTROLS_SCORES,
    DENSE,
    FORKED_RANKS,
    PRUNE,
    SLOWLY,
    attempt_folders,
    causes,
    done,
    job_names,
    label_of,
    read,
)

pytestmark = [pytest.mark.slurm, pytest.mark.beside]

# As in a shell inside an interactive job on a GPU node, and as people set them for jobs of another kind.
SURROUNDINGS = {
    **dict.fromkeys(["SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_MEM_PER_CPU"], "999"),
    **dict.fromkeys(["SLURM_NTASKS", "SLURM_NNODES", "SRUN_CPUS_PER_TASK", "SLURM_PROCID", "SLURM_GPUS_ON_NODE"], "7"),
    **dict.fromkeys(["SLURM_EXPORT_ENV", "SBATCH_EXPORT", "SRUN_EXPORT_ENV"], "NONE"),
    **dict.fromkeys(["SBATCH_PARTITION", "SBATCH_ACCOUNT", "SLURM_NODELIST", "SBATCH_OUTPUT"], "/nowhere"),
    **dict.fromkeys(["SLURM_TIMELIMIT", "SBATCH_NO_REQUEUE"], "1"),
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x10",
}


@pytest.mark.thorough
def test_a_whole_sweep(cluster, config, finished, tmp_path_factory):
    """Without forks: each stage runs once, and no more jobs at once than allowed; then nothing is left to do."""
    out = tmp_path_factory.mktemp("cluster") / "out"
    done(cluster, out, finished, cluster.submit(config, out, "--max-running", "2", real=True))
    assert causes(out) == ["done"] * 8
    assert len(job_names(out)) == 4, "passes, the dense model, its control, and the row"
    starts = [read(next(folder.glob("run.*.json"))) for folder in attempt_folders(out)]
    running = 0
    for _, change in sorted([(run["started"], 1) for run in starts] + [(run["ended"], -1) for run in starts]):
        running += change
        assert running <= 2
    assert "submitted" not in done(cluster, out, finished, cluster.submit(config, out))


IMPORTANCE, RECOVERY, SCORES = "importance alpha", f"recover {CELL} + lora", f"evaluate {CELL} + lora"


@pytest.mark.parametrize(
    ("stages", "missing"),
    [((RECOVERY,), ()), pytest.param((IMPORTANCE, DENSE), (PRUNE, RECOVERY), marks=pytest.mark.thorough)],
)
def test_a_rank_is_killed(cluster, config, finished, without, stages, missing):
    """In mid chain; and in what another job, which Slurm then drops, waits for."""
    out = without(*stages, *missing, SCORES)
    submitted = cluster.submit(config, out, **SLOWLY, **FORKED_RANKS)
    alive = list(stages)
    while alive:
        with submitted.held(*alive) as (stage, ranks):
            ranks[max(ranks)].send_signal(signal.SIGKILL)
        alive.remove(stage)
    done(cluster, out, finished, submitted)
    for stage in stages:
        assert causes(out, stage) == ["killed", "done"]
        folders = [folder for folder in (out / "store" / stage.split()[0]).iterdir() if label_of(out, folder) == stage]
        assert read(folders[0] / "manifest.json")["world_size"] == 2
    assert [causes(out, stage) for stage in (*missing, SCORES)] == [["interrupted", "done"]] * (len(missing) + 1)
    snapshot = Path(re.search("--chdir=(.*)", (attempt_folders(out)[0] / "job.sh").read_text())[1])
    assert snapshot.parent == (out / "code").resolve() and snapshot.is_dir()


def test_status_logs_and_cancel(cluster, config, without):
    out = without(CONTROL, CONTROLS_SCORES)
    slowly = {**SLOWLY, "SLOW_S": "6", **SURROUNDINGS}  # each of the commands below takes seconds
    submitted = cluster.submit(config, out, "--no-follow", real=True, **slowly)  # its ranks are interpreters
    code, output = submitted.end()
    assert code == 0 and "--status shows them" in output
    job_id = submitted.job_at_work(CONTROL, beats=2)
    status = cluster.sweep(config, out, "--status")
    (line,) = [line for line in status.splitlines() if line.startswith("recover  ") and job_id in line]
    assert "running" in line and "recovery " in line and "/12" in line and "n[1-2]" in line
    assert "queued" in status and status.count("done") == 6
    logs = cluster.sweep(config, out, "--logs", "alpha dense + lora")
    assert "recovery: step 1/12" in logs
    run = read(next(attempt_folders(out)[0].glob("run.*.json")))
    assert (run["job_id"], run["restart"]) == (job_id, 0), "not those of the other job"
    assert "cancelled 1 job:" in cluster.sweep(config, out, "--cancel")
    assert not [state for state in cluster.states(job_names(out)).values() if state != "COMPLETING"]
    status = cluster.sweep(config, out, "--status")
    assert "running" not in status and "queued" not in status


def test_slurm_refuses_a_job(cluster, config, without):
    out = without(CONTROL)
    profile = cluster.profile("wrong", partition="nowhere")
    code, output = cluster.submit(config, out, profile=profile).end()
    assert code == 2 and "invalid partition" in output and "check the profile" in output and "Traceback" not in output
    assert job_names(out) and not cluster.states(job_names(out))
