"""Every fault on real daemons. After it: the same results, nothing done twice, no job left, no hand needed."""

import os
import shutil
import signal
import subprocess
import time

import pytest
import yaml
from clusters import (
    CONTROL,
    DENSE,
    PRUNE,
    SLOWLY,
    Submitted,
    assert_undisturbed,
    attempt_folders,
    causes,
    done,
    job_names,
    rank_processes,
    read,
    runs,
    slurm,
    wait_for,
)
from ranks import ROOT, killing
from sweeps import results

pytestmark = pytest.mark.slurm


@pytest.fixture(autouse=True)
def _needs_a_cluster(cluster):
    """Skips or fails before anything slow where there is no cluster."""


@pytest.fixture(scope="module")
def time_limited(cluster, config, without, tmp_path_factory):
    """A sweep whose training takes longer than two time limits; runs beside the tests that leave the cluster alone."""
    profile = tmp_path_factory.mktemp("profile") / "short.yaml"
    settings = yaml.safe_load((ROOT / "slurm" / "profiles" / "local-cluster.yaml").read_text())
    profile.write_text(yaml.safe_dump(settings | {"time_minutes": 1, "signal_seconds": 10}))
    return Submitted(config, without(CONTROL), profile=str(profile), **{**SLOWLY, "SLOW_S": "6"})


def test_a_rank_is_killed_in_each_stage(cluster, config, finished, without, time_limited):
    stages = ["importance alpha", CONTROL, DENSE]
    out = without(*stages, PRUNE, "recover alpha 0.2")  # a pass runs where something lacks that is made from it
    submitted = Submitted(config, out, **SLOWLY)
    alive = list(stages)
    while alive:
        stage = wait_for(lambda: next((stage for stage in alive if submitted.is_at_work(stage)), None))
        ranks = rank_processes(out, stage)
        ranks[max(ranks)].send_signal(signal.SIGKILL)
        alive.remove(stage)
    done(cluster, out, finished, submitted)
    for stage in stages:
        assert causes(out, stage) == ["killed", "done"]


def test_scancel(cluster, config, finished, without):
    out = without(CONTROL)
    submitted = Submitted(config, out, **SLOWLY)
    slurm("scancel", submitted.job_at_work(CONTROL, beats=2))
    code, output = submitted.end()
    assert code == 1 and "cancelled" in output
    assert ["cancelled" in row["cause"] for row in results(out) if row["status"] == "missing"] == [True]
    done(cluster, out, finished, Submitted(config, out))
    assert causes(out) == ["cancelled", "done"] and runs(out, CONTROL) == ["interrupted", "done"]


def test_requeue_by_hand(cluster, config, finished, without):
    out = without(CONTROL)
    submitted = Submitted(config, out, **SLOWLY)
    slurm("scontrol", "requeue", submitted.job_at_work(CONTROL, beats=3))
    done(cluster, out, finished, submitted)
    assert causes(out) == ["done"] and len(runs(out, CONTROL)) == 2


def test_a_checkpoint_is_corrupted_while_a_job_needs_it(cluster, config, finished, without):
    out = without("evaluate alpha 0.2 + lora", "recover alpha 0.2")
    victim = next((out / "store" / "prune").glob("*/model.safetensors"))
    stat, content = victim.stat(), bytearray(victim.read_bytes())
    content[-1] ^= 1
    victim.write_bytes(content)
    os.utime(victim, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # bit rot: only reading it all shows it
    done(cluster, out, finished, Submitted(config, out))
    assert causes(out, "recover alpha 0.2") == ["lost input", "done"] and causes(out, PRUNE) == ["done"]
    assert len(list((out / "store" / "quarantine").iterdir())) == 1


def test_two_sweeps_at_once(cluster, config, finished, without):
    out = without(DENSE, "evaluate alpha 0.2 + lora")
    both = [Submitted(config, out) for _ in range(2)]
    ends = [submitted.end() for submitted in both]
    assert [code for code, _ in ends] == [0, 0], ends
    assert_undisturbed(cluster, out, finished)
    assert sorted(causes(out)) == ["done", "done"]


def test_a_second_job_for_a_stage_that_runs(cluster, config, finished, without):
    """As if a submission had been repeated: the second job waits for the first, and then has nothing to do."""
    out = without(CONTROL)
    submitted = Submitted(config, out, **SLOWLY)
    first = submitted.job_at_work(CONTROL)
    (folder,) = attempt_folders(out)
    second = slurm("sbatch", "--parsable", f"{folder}/job.sh").strip()
    done(cluster, out, finished, submitted)
    wait_for(lambda: "COMPLETED" in slurm("squeue", "--states=all", "--noheader", f"--jobs={second}", "--format=%T"))
    ends = {job: read(folder / f"run.{job}.0.json") for job in (first, second)}
    assert [end["how"] for end in ends.values()] == ["done", "done"]
    assert ends[second]["ended"] >= ends[first]["ended"], "they did not work on it together"
    assert_undisturbed(cluster, out, finished)


def test_the_time_limit_is_hit_twice_in_mid_recovery(cluster, finished, time_limited):
    out = time_limited.out
    done(cluster, out, finished, time_limited)
    assert causes(out) == ["done"], "one job, requeued by itself"
    assert runs(out, CONTROL)[:2] == ["interrupted", "interrupted"] and runs(out, CONTROL)[-1] == "done"


@pytest.mark.parametrize("grace_time", [0, 20])
def test_preemption(cluster, config, finished, without, grace_time):
    slurm("scontrol", "update", "partitionname=main", f"gracetime={grace_time}")
    out = without(CONTROL)
    submitted = Submitted(config, out, **SLOWLY)
    submitted.job_at_work(CONTROL, beats=2)
    subprocess.run(["srun", "--partition=urgent", "--nodes=4", "--exclusive", "true"], check=True, timeout=120)
    done(cluster, out, finished, submitted)
    assert causes(out) == ["done"] and len(runs(out, CONTROL)) >= 2
    assert runs(out, CONTROL)[0] == "interrupted", "work was saved together before the end"


def test_a_node_dies(cluster, config, finished, without):
    out = without(CONTROL)
    submitted = Submitted(config, out, **SLOWLY)
    submitted.job_at_work(CONTROL, beats=2)
    ranks = rank_processes(out, CONTROL)
    victim = ranks[max(ranks)].environ()["SLURMD_NODENAME"]
    cluster.kill_node(victim)
    try:
        done(cluster, out, finished, submitted)
    finally:
        cluster.run("start", victim)
        cluster.run("up")
    assert causes(out)[-1] == "done" and len(runs(out, CONTROL)) == 2
    assert all(cause in ("node failure", "killed", "done") for cause in causes(out))


def test_the_controller_restarts_and_accounting_is_down(cluster, config, finished, without):
    out = without(CONTROL)
    cluster.run("stop", "slurmdbd")
    try:
        submitted = Submitted(config, out, **SLOWLY)
        submitted.job_at_work(CONTROL)
        cluster.run("stop", "slurmctld")
        time.sleep(5)
        cluster.run("start", "slurmctld")
        done(cluster, out, finished, submitted)
    finally:
        cluster.run("up")
    assert causes(out) == ["done"] and runs(out, CONTROL) == ["done"]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_the_disk_is_full(cluster, config, finished, without, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], check=True)
    try:
        out = disk / "out"
        shutil.copytree(without(CONTROL), out)
        slurm("scontrol", "update", "partitionname=main", "state=down")
        assert Submitted(config, out, "--no-follow").end()[0] == 0
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 64 * 1024))
        slurm("scontrol", "update", "partitionname=main", "state=up")
        wait_for(lambda: not cluster.states(job_names(out)))
        code, output = Submitted(config, out).end()
        assert code == 2 and "No space left on device" in output and "Traceback" not in output, output
        ballast.unlink()
        done(cluster, out, finished, Submitted(config, out))
        assert causes(out)[-1] == "done"
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_the_launcher_is_killed_throughout_a_submission(cluster, config, finished, without):
    """At every third write; the crash campaign (tests/faults) goes through all of them, without a cluster."""
    slurm("scontrol", "update", "partitionname=main", "state=down")  # jobs are accepted, and wait
    try:
        for kill_at in range(1, 100, 3):
            out = without(DENSE)
            fault = killing("launcher", kill_at, str(out / "store"))
            code, _ = Submitted(config, out, "--no-follow", **fault).end()
            code_again, output = Submitted(config, out, "--no-follow").end()
            assert code_again == 0, output
            jobs = cluster.states(job_names(out))
            assert len(jobs) == 1, f"killed before operation {kill_at}: {jobs}"
            if code == 0:
                break
            if kill_at % 4:
                slurm("scancel", *jobs)
        assert kill_at > 15, "there are many writes to die at"
    finally:
        slurm("scontrol", "update", "partitionname=main", "state=up")
    done(cluster, out, finished, Submitted(config, out))


def test_accounting_is_off(cluster, config, finished, without):
    cluster.run("stop", "slurmctld")
    cluster.run("up", "--no-accounting")
    cluster.run("stop", "slurmdbd")
    try:
        out = without(DENSE)
        submitted = Submitted(config, out, **SLOWLY)
        submitted.job_at_work(DENSE)
        for process in rank_processes(out, DENSE).values():
            process.send_signal(signal.SIGKILL)
        done(cluster, out, finished, submitted)
        assert causes(out) == ["killed", "done"]
    finally:
        cluster.run("stop", "slurmctld")
        cluster.run("up")
