"""Faults on real daemons, and then the same results, nothing done twice, no job left; more are in test_sweep.py."""

import os
import random
import shutil
import subprocess
import time

import pytest
from clusters import (
    CELL,
    CONTROL,
    CONTROLS_SCORES,
    DENSE,
    FORKED_RANKS,
    FORKED_SUCCESSORS,
    SLOWLY,
    assert_undisturbed,
    causes,
    done,
    job_names,
    runs,
    wait_for,
)
from sweeps import results

pytestmark = [pytest.mark.slurm, pytest.mark.beside, pytest.mark.thorough]


@pytest.mark.beside("time limit")
def test_the_time_limit_is_hit_in_mid_recovery(cluster, config, finished, without):
    first_in_queue = {"nice": -10000}
    # Two minutes, as ranks on a busy machine need half a minute to start, and another one to end a step and save it.
    profile = cluster.profile("short", time_minutes=2, signal_seconds=70, sbatch=first_in_queue)
    # So slow that all steps, where they are slow, take longer than the time limit.
    slowly = {**SLOWLY, **FORKED_RANKS, "SLOW_S": "16", "SLOW_STARTS": "1"}
    out = without(CONTROL, CONTROLS_SCORES)
    done(cluster, out, finished, cluster.submit(config, out, profile=profile, **slowly))
    assert causes(out) == ["done", "done"] and len(job_names(out)) == 1, "one job, requeued by itself"
    *ended_early, last = runs(out, CONTROL)
    assert set(ended_early) == {"interrupted"} and last == "done"


def test_scancel(cluster, config, finished, without):
    out = without(CONTROL, CONTROLS_SCORES)
    submitted = cluster.submit(config, out, **SLOWLY, **FORKED_SUCCESSORS)
    cluster.slurm("scancel", submitted.job_at_work(CONTROL, beats=2))
    code, output = submitted.end()
    assert code == 1 and "cancelled" in output
    assert ["cancelled" in row["cause"] for row in results(out) if row["status"] != "done"] == [True]
    done(cluster, out, finished, cluster.submit(config, out, **FORKED_RANKS))
    assert causes(out, CONTROL) == ["cancelled", "done"] and runs(out, CONTROL) == ["interrupted", "done"]
    assert causes(out, CONTROLS_SCORES) == ["cancelled", "done"]


def test_a_launcher_dies_while_its_job_is_in_mid_chain(cluster, config, finished, without):
    out = without(CONTROL, CONTROLS_SCORES)
    submitted = cluster.submit(config, out, real=True, **SLOWLY, **FORKED_RANKS)
    submitted.job_at_work(CONTROL, beats=2)
    submitted.kill()
    output = done(cluster, out, finished, cluster.submit(config, out, **FORKED_RANKS))
    assert "submitted" not in output and causes(out) == ["done", "done"] and len(job_names(out)) == 1


def test_two_sweeps_at_once(cluster, config, finished, without):
    out = without(DENSE, f"evaluate {CELL} + lora")
    both = [cluster.submit(config, out, **FORKED_RANKS) for _ in range(2)]
    ends = [submitted.end() for submitted in both]
    assert [code for code, _ in ends] == [0, 0], ends
    assert_undisturbed(cluster, out, finished)
    assert sorted(causes(out)) == ["done", "done"]


@pytest.mark.beside("nodes")
def test_preemption(cluster, config, finished, without):
    profile = cluster.partition("grace", nodes="n[3-4]", gracetime="20", preemptmode="requeue")
    out = without(CONTROL)
    submitted = cluster.submit(config, out, profile=profile, **SLOWLY, **FORKED_SUCCESSORS)
    submitted.job_at_work(CONTROL, beats=2)
    cluster.slurm("srun", "--partition=urgent", "--nodelist=n[3-4]", "--exclusive", "true")
    done(cluster, out, finished, submitted)
    assert causes(out) == ["done"] and len(runs(out, CONTROL)) >= 2
    assert runs(out, CONTROL)[0] == "interrupted", "work was saved together before the end"


@pytest.mark.beside("nodes")
def test_a_node_dies(cluster, config, finished, without):
    profile = cluster.partition("mortal", nodes="n[2-4]")
    out = without(CONTROL)
    submitted = cluster.submit(config, out, profile=profile, **SLOWLY, **FORKED_RANKS)
    with submitted.held(CONTROL) as (_, ranks):
        victim = ranks[max(ranks)].environ()["SLURMD_NODENAME"]
        cluster.kill_node(victim)
    done(cluster, out, finished, submitted)
    cluster.run("start", victim)
    assert len(runs(out, CONTROL)) == 2 and causes(out) in (["done"], ["killed", "done"])


@pytest.mark.beside("disturbed")
def test_the_controller_restarts(disturbed, config, finished, without):
    out = without(CONTROL)
    submitted = disturbed.submit(config, out, **SLOWLY, **FORKED_RANKS)
    submitted.job_at_work(CONTROL)
    disturbed.run("stop", "slurmctld")
    time.sleep(5)
    disturbed.run("start", "slurmctld")
    done(disturbed, out, finished, submitted)
    assert causes(out) == ["done"] and runs(out, CONTROL) == ["done"]


@pytest.mark.beside("disturbed")
def test_a_prolog_fails(disturbed, config, finished, without):
    """Slurm holds the job indefinitely, and drains the node."""
    broken = disturbed.folder / "prolog.fails.n1"
    broken.touch()
    try:
        out = without(DENSE)
        output = done(disturbed, out, finished, disturbed.submit(config, out, **FORKED_RANKS))
        assert "could not be started and would have waited for ever: launch failed requeued held" in output
        assert causes(out) == ["killed", "done"]
    finally:
        broken.unlink()
        disturbed.slurm("scontrol", "update", "nodename=n1", "state=resume")


def test_the_disk_is_full(cluster, config, finished, without, tmp_path_factory):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a small disk")
    profile = cluster.partition("disk", nodes="n[1-2]", state="down")
    disk = tmp_path_factory.mktemp("disk")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", str(disk)], check=True)
    try:
        out = disk / "out"
        # Drafts of its code come and go: other launchers check the same folder.
        shutil.copytree(without(CONTROL), out, ignore=shutil.ignore_patterns(".draft-*"))
        assert cluster.submit(config, out, "--no-follow", profile=profile, **FORKED_RANKS).end()[0] == 0
        ballast = disk / "ballast"
        ballast.write_bytes(bytes(shutil.disk_usage(disk).free - 64 * 1024))
        cluster.slurm("scontrol", "update", "partitionname=disk", "state=up")
        wait_for(lambda: not cluster.states(job_names(out)))
        code, output = cluster.submit(config, out, profile=profile).end()
        assert code == 2 and "No space left on device" in output and "Traceback" not in output, output
        ballast.unlink()
        done(cluster, out, finished, cluster.submit(config, out, profile=profile, **FORKED_RANKS))
        assert causes(out)[-1] == "done"
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)


def test_slurm_runs_no_more_jobs_than_there_are_names_whatever_is_dropped(cluster):
    """As launchers submit them with ``--max-running 3``, sampled each second; some wait for needs, too."""
    draw, ids, most = random.Random(0), [], 0
    for number in range(18):
        needs = f",afterok:{draw.choice(ids)}" if ids and number % 3 == 0 else ""
        asked = ["--cpus-per-task=1", f"--job-name=hfprune-limit-{number % 3}", f"--dependency=singleton{needs}"]
        asked += ["--kill-on-invalid-dep=yes", "--output=/dev/null", "--wrap", f"sleep {draw.randint(1, 6)}"]
        ids.append(cluster.slurm("sbatch", "--parsable", *asked).strip())

    def left():
        lines = cluster.slurm("squeue", "--noheader", "--format=%i|%T|%j").splitlines()
        return [line.split("|")[:2] for line in lines if "hfprune-limit" in line]

    while jobs := left():
        most = max(most, sum(state == "RUNNING" for _, state in jobs))
        if draw.random() < 0.3:
            cluster.slurm("scancel", draw.choice(jobs)[0])
        time.sleep(1)
    assert most == 3
