"""The test cluster itself: only on loopback, and gone without a trace once it has been taken down."""

import signal
import subprocess
from contextlib import suppress

import psutil
import pytest
from clusters import wait_for
from ranks import surroundings

pytestmark = [pytest.mark.slurm, pytest.mark.beside]
of_another = pytest.mark.beside("another cluster")

PORT_BASE = 18100
PROGRAMS = {"slurmctld", "slurmd", "slurmstepd", "munged", "srun"}


def of_all_processes(look):
    """Return what a function returns of each process, of those that can be looked at."""
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            found += look(process)
    return found


def listening():
    """Return the programs of clusters, each with an address on which it listens."""

    def look(process):
        # A program that has re-executed itself has the name behind Debian's links, such as slurmd-wlm.
        program = process.name().removesuffix("-wlm")
        sockets = process.net_connections("inet") if program in PROGRAMS else []
        return [(program, each.laddr.ip) for each in sockets if each.status == psutil.CONN_LISTEN]

    return of_all_processes(look)


def processes_in(folder):
    """Return the programs that have files of a folder open or were started with its configuration."""

    def look(process):
        opened = [file.path for file in process.open_files()]
        return [process.name()] * any(str(folder) in path for path in [*opened, *process.cmdline()])

    return of_all_processes(look)


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


@of_another
@pytest.mark.thorough
def test_up_and_down_again(new_cluster):
    with new_cluster(PORT_BASE) as another:
        another.run("up")
        pids = {daemon: another.pid(daemon) for daemon in ("slurmctld", "n1", "n4", "munge")}
        another.run("up")
        assert pids == {daemon: another.pid(daemon) for daemon in pids}, "what runs as it should is left alone"
        another.slurm("sbatch", "--output=/dev/null", "--wrap", f"sleep 1000 # {another.folder}")
        wait_for(lambda: "slurmstepd" in processes_in(another.folder))
        # The worst case: nobody is there to end the job, and a daemon's pid is no longer known.
        psutil.Process(another.pid("slurmctld")).send_signal(signal.SIGKILL)
        (another.folder / "run" / "n1.pid").unlink()
        another.run("stop", "n2")
        with subprocess.Popen(["sleep", "1000"]) as bystander:  # has n2's pid from before the machine restarted
            try:
                (another.folder / "run" / "n2.pid").write_text(f"{bystander.pid}\n")
                another.run("down")
                assert bystander.poll() is None
            finally:
                bystander.kill()
        assert processes_in(another.folder) == []
        another.run("down")
