"""A sweep on the cluster, a rank of which is killed in each stage: the same results as on this machine; and commands
that inspect it. If every test is asked for, also a whole sweep of processes that are no forks.
"""

import re
import signal
from pathlib import Path

import pytest
from clusters import (
    CELL,
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
    table,
)
from sweeps import artifacts

pytestmark = [pytest.mark.slurm, pytest.mark.beside]


def of_the_whole_sweep(test):
    return pytest.mark.beside("whole sweep")(pytest.mark.thorough(test))


@of_the_whole_sweep
def test_the_bits_are_those_of_the_local_backend(on_cluster, finished):
    out, _ = on_cluster()
    for kind in ("importance", "prune", "recover"):
        assert artifacts(out, kind) == artifacts(finished, kind)
    assert table(out) == table(finished)


@of_the_whole_sweep
def test_jobs_ran_once_and_never_more_at_once_than_allowed(on_cluster):
    out, _ = on_cluster()
    assert set(causes(out)) == {"done"} and len(attempt_folders(out)) == 8
    assert len(job_names(out)) == 4, "passes, the dense model, its control, and the row"
    starts = [read(next(folder.glob("run.*.json"))) for folder in attempt_folders(out)]
    running = 0
    for _, change in sorted([(run["started"], 1) for run in starts] + [(run["ended"], -1) for run in starts]):
        running += change
        assert running <= 2


@of_the_whole_sweep
def test_a_second_run_submits_nothing(cluster, on_cluster, config):
    out, _ = on_cluster()
    before = len(attempt_folders(out))
    code, output = cluster.submit(config, out).end()
    assert code == 0 and "submitted" not in output and len(attempt_folders(out)) == before


def test_a_rank_is_killed_in_each_stage(cluster, config, finished, without):
    stages = ["importance alpha", f"recover {CELL}", DENSE]
    out = without(*stages, PRUNE, f"evaluate {CELL} + lora")
    submitted = cluster.submit(config, out, **SLOWLY, **FORKED_RANKS)
    alive = list(stages)
    while alive:
        with submitted.held(*alive) as (stage, ranks):
            ranks[max(ranks)].send_signal(signal.SIGKILL)
        alive.remove(stage)
    done(cluster, out, finished, submitted)
    for stage in stages:
        assert [cause for cause in causes(out, stage) if cause != "interrupted"] == ["killed", "done"]
        folders = [folder for folder in (out / "store" / stage.split()[0]).iterdir() if label_of(out, folder) == stage]
        assert read(folders[0] / "manifest.json")["world_size"] == 2
    assert causes(out, PRUNE) == ["interrupted", "done"], "its job waited for the first importance"
    assert causes(out, f"evaluate {CELL} + lora") == ["interrupted", "interrupted", "done"]
    snapshot = Path(re.search("--chdir=(.*)", (attempt_folders(out)[0] / "job.sh").read_text())[1])
    assert snapshot.parent == (out / "code").resolve() and read(snapshot / "provenance.json")["git_commit"]


def test_status_logs_and_cancel(cluster, config, without):
    out = without("recover alpha dense", "evaluate alpha dense + lora")
    slowly = {**SLOWLY, "SLOW_S": "6"}  # each of the commands below takes seconds
    submitted = cluster.submit(config, out, "--no-follow", real=True, **slowly)  # its ranks are interpreters
    code, output = submitted.end()
    assert code == 0 and "--status shows them" in output
    job_id = submitted.job_at_work("recover alpha dense", beats=2)
    status = cluster.sweep(config, out, "--status")
    (line,) = [line for line in status.splitlines() if line.startswith("recover  ") and job_id in line]
    assert "running" in line and "recovery " in line and "/12" in line and "n[1-2]" in line
    assert "queued" in status and status.count("done") == 6
    logs = cluster.sweep(config, out, "--logs", "alpha dense + lora")
    assert "recovery: step 1/12" in logs
    assert "cancelled 1 job:" in cluster.sweep(config, out, "--cancel")
    assert not [state for state in cluster.states(job_names(out)).values() if state != "COMPLETING"]
    status = cluster.sweep(config, out, "--status")
    assert "running" not in status and "queued" not in status


def test_slurm_refuses_a_job(cluster, config, without):
    out = without("recover alpha dense")
    profile = cluster.profile("wrong", partition="nowhere")
    code, output = cluster.submit(config, out, profile=profile).end()
    assert code == 2 and "invalid partition" in output and "check the profile" in output and "Traceback" not in output
    assert job_names(out) and not cluster.states(job_names(out))
