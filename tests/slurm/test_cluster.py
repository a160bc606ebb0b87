"""The test cluster itself: only on loopback, and gone without a trace in the worst case (conftest.py looks)."""

import signal
import subprocess
from contextlib import suppress

import psutil
import pytest
from clusters import wait_for
from ranks import surroundings

pytestmark = [pytest.mark.slurm, pytest.mark.beside]

PORT_BASE = 18100
PROGRAMS = {"slurmctld", "slurmd", "slurmstepd", "munged", "srun"}


def listening():
    """Return the programs of clusters, each with an address on which it listens."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            # A program that has re-executed itself has the name behind Debian's links, such as slurmd-wlm.
            program = process.name().removesuffix("-wlm")
            sockets = process.net_connections("inet") if program in PROGRAMS else []
            found += [(program, each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN]
    return found


def test_nothing_can_be_reached_from_outside(cluster):
    environment = {**surroundings(), **cluster.environment}
    step = subprocess.Popen(["srun", "--nodes=2", "--job-name=open", "sleep", "1000"], env=environment)
    try:
        wait_for(lambda: cluster.slurm("squeue", "--noheader", "--steps", "--name=open"))
        wait_for(lambda: "srun" in dict(listening()))
        found = listening()
    finally:
        step.terminate()
        step.wait()
    assert {"slurmctld", "slurmd", "srun"} <= set(dict(found))
    assert [each for each in found if not each[1].startswith("127.")] == []


@pytest.mark.beside("another cluster")
@pytest.mark.thorough
def test_a_cluster_goes_also_if_nobody_can_end_its_jobs_and_pids_are_lost(new_cluster):
    with new_cluster(PORT_BASE) as another:
        another.run("up")
        pids = {daemon: another.pid(daemon) for daemon in ("slurmctld", "n1", "n4", "munge")}
        another.run("up")
        assert pids == {daemon: another.pid(daemon) for daemon in pids}, "what runs as it should is left alone"
        another.slurm("sbatch", "--output=/dev/null", "--wrap", f"sleep 1000 # {another.folder}")
        wait_for(lambda: another.slurm("squeue", "--noheader", "--states=running"))
        psutil.Process(another.pid("slurmctld")).send_signal(signal.SIGKILL)
        (another.folder / "run" / "n1.pid").unlink()
