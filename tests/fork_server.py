"""Commands of this project without the seconds that imports take, as forks of one warm process (stage/warm.py).

The product starts ranks in this way. Here whole commands, Slurm's tasks and pytest's workers are started so, too, and
launchers that are forks get their ranks from the same process instead of one of their own. Since a fork shares its hash
seed and its environment at import time, processes of their own (``real``) remain the reference.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from hfprune_launch.local import backend
from hfprune_launch.stage import warm

from hfprune_dist.store.machine import count_gpus

FOLDER = Path(__file__).resolve().parent
WORKER = FOLDER / "xdist_worker.py"
ADDRESS = "HFPRUNE_FORK_SERVER"  # set in processes that the server forks
EXECUTABLE = "HFPRUNE_EXECUTABLE"  # what they take for their Python, which they start jobs with
# Importing must not query the network.
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **warm.IMPORTING}


class OwnProcess(warm.WarmProcess):
    """The product's warm process, where the others of tests share one."""

    _connect = warm.WarmProcess._connect


def forked(command: Sequence[str | Path]) -> list[str]:
    """Return ``python script.py ...`` as a command that runs in a fork instead.

    Where a fork would not work the command stays as it is: a GPU's driver that has been queried does not survive one.
    """
    command = [str(part) for part in command]
    if sys.platform != "linux" or count_gpus():
        return command
    return [sys.executable, "-IS", str(FOLDER / "fork_client.py"), _address(), *command[1:]]


def share() -> None:
    """Let launchers in this process get their ranks from the server."""
    if sys.platform == "linux" and not count_gpus():
        warm.WarmProcess._connect = _connect
        backend.RUN = "fork_server:run_rank"


def _connect(_process: warm.WarmProcess, streams: Sequence[int]) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.connect(_address())
    socket.send_fds(connection, [b"."], list(streams))
    return connection


@functools.cache
def _address() -> str:
    """Return the socket of a server that is ready, and start one if there is none."""
    address = os.environ.get(ADDRESS) or start()
    while not Path(address).exists():
        assert Path(address).parent.is_dir(), "the fork server is gone"
        time.sleep(0.05)
    return address


def start() -> str:
    """Return the socket of a new server, which appears soon; both end with this process."""
    folder = tempfile.TemporaryDirectory(prefix="hfprune-fork-server-")
    address = f"{folder.name}/socket"
    server = subprocess.Popen(
        [sys.executable, __file__, address, str(os.getpid())],
        env={**os.environ, **QUIET},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )

    def stop() -> None:
        server.kill()
        server.wait()
        folder.cleanup()

    atexit.register(stop)
    return address


def serve(address: str, parent: int) -> None:
    warm.die_with_parent(parent)
    os.fsync = lambda _: None  # nothing in a fork has to survive a crash, and each call waits for the disk
    warm.import_everything()  # what libraries say meanwhile isn't for the first client
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    Path(f"{address}.new").rename(address)  # only now, because clients connect at once

    def receive() -> list[int]:
        connection, _ = listener.accept()
        streams = socket.recv_fds(connection, 1, 3)[1]
        return [connection.detach(), *streams]

    warm.serve(receive)


# In a fork.


def run_rank(arguments: list[str]) -> None:
    """Be a rank of a stage, with the faults that its environment asks for."""
    _customize()
    from hfprune_launch.stage import run

    run.main(arguments)


def become(arguments: list) -> None:
    """Be a command: arguments are its environment, its script, and what else follows."""
    environment, script, *rest = arguments
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = [script, *rest]
    sys.executable = environment.get(EXECUTABLE, sys.executable)
    sys.path[0] = str(Path(script).resolve().parent)
    sys.path.insert(1, str(FOLDER))
    _customize()
    share()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def _customize() -> None:
    given = os.environ.get("PYTHONPATH", "")
    sys.path[1:1] = [path for path in given.split(os.pathsep) if path]
    if given:
        sys.modules.pop("sitecustomize", None)
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")


if __name__ == "__main__":
    serve(sys.argv[1], int(sys.argv[2]))
