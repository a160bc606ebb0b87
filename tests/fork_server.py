"""Commands of this project without the seconds that imports take, as forks of one warm process (local/warm.py).

The product starts ranks in this way. Here whole commands, Slurm's tasks and pytest's workers are started so, too, and
launchers that are forks get their ranks from the same process instead of one of their own. Since a fork shares its hash
seed and its environment at import time, processes of their own (``real``) remain the reference.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import importlib
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path

from hfprune_launch.local import backend, warm
from hfprune_launch.local.warm import WarmProcess
from hfprune_launch.stage.run import die_with_parent

from hfprune_dist.store.machine import count_gpus

FOLDER = Path(__file__).resolve().parent
WORKER = FOLDER / "xdist_worker.py"
ADDRESS = "HFPRUNE_FORK_SERVER"  # set in processes that the server forks
EXECUTABLE = "HFPRUNE_EXECUTABLE"  # what they take for their Python, which they start jobs with
# Importing must not query the network.
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **warm.IMPORTING}


class OwnProcess(WarmProcess):
    """The product's warm process, where the others of tests are forks of the server."""

    begin = WarmProcess.begin


def forked(command: Sequence[str | Path]) -> list[str]:
    """Return ``python script.py ...`` as a command that runs in a fork, unless a GPU's driver does not survive one."""
    command = [str(part) for part in command]
    if sys.platform != "linux" or count_gpus():
        return command
    return [sys.executable, "-IS", str(FOLDER / "fork_client.py"), _address(), *command[1:]]


def share() -> None:
    """Let a fork of the server be the warm process of launchers in this process."""
    if sys.platform == "linux" and not count_gpus():
        WarmProcess.begin = _begin
        backend.RUN = "fork_server:run_rank"


def _begin(process: WarmProcess) -> None:
    if process._connection is not None:
        return
    server = socket.socket(socket.AF_UNIX)
    server.connect(_address())
    server.sendall(b".")
    process._connection = Connection(server.detach())


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
    """Be the server: whoever connects gets a fork, which is a warm process, or runs a command on the streams given."""
    die_with_parent(parent)
    os.fsync = lambda _: None  # nothing in a fork has to survive a crash, and each call waits for the disk
    warm.import_everything()  # what libraries say meanwhile isn't for the first client
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{address}.new")
    listener.listen(64)
    Path(f"{address}.new").rename(address)  # only now, because clients connect at once
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # forks that have ended leave nothing behind
    server = os.getpid()
    while True:
        connection, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            die_with_parent(server)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            streams = socket.recv_fds(connection, 1, 3)[1]
            run_command(connection, streams) if streams else warm.serve(Connection(connection.detach()))
            os._exit(0)
        connection.close()


# In a fork.


def run_rank(arguments: list[str]) -> None:
    """Be a rank of a stage, with the faults that its environment asks for."""
    _customize()
    from hfprune_launch.stage import run

    run.main(arguments)


def run_command(client: socket.socket, streams: list[int]) -> None:
    """Run a client's command, with its environment and folder, in a fork; send its process id, then its exit code."""
    environment, folder, *command = json.loads(client.makefile("r").readline())
    os.chdir(folder)
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    pid = warm._fork(functools.partial(become, *command), environment)
    with contextlib.suppress(OSError):  # it is gone
        client.sendall(f"{pid}\n".encode())
    ended = status = 0
    while not ended:
        if select.select([client], [], [], warm.POLL_S)[0]:
            os.kill(pid, signal.SIGKILL)
        ended, status = os.waitpid(pid, os.WNOHANG)
    with contextlib.suppress(OSError):
        client.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())


def become(script: str, *rest: str) -> None:
    """Be a command."""
    sys.argv = [script, *rest]
    sys.executable = os.environ.get(EXECUTABLE, sys.executable)
    sys.path[0] = str(Path(script).resolve().parent)
    sys.path.insert(1, str(FOLDER))
    _customize()
    if script == "-u":
        be_slurm_rank(Path(rest[-1]))
    share()
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        atexit._run_exitfuncs()


def be_slurm_rank(attempt: Path) -> None:
    """Be what ``python -u -m hfprune_launch.slurm.job`` is: a rank with the code on PYTHONPATH instead of ours."""
    # An interpreter reads this when it starts, long before this process was forked.
    sys.dont_write_bytecode = bool(os.environ.get("PYTHONDONTWRITEBYTECODE"))
    for name in list(sys.modules):
        if name.partition(".")[0] in ("hfprune_dist", "hfprune_launch"):
            del sys.modules[name]
    from hfprune_launch.slurm.job import main

    main(attempt)


def _customize() -> None:
    given = os.environ.get("PYTHONPATH", "")
    sys.path[1:1] = [path for path in given.split(os.pathsep) if path]
    if given:
        sys.modules.pop("sitecustomize", None)
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")


if __name__ == "__main__":
    # Forks import no second one, to which our warm process would look like the product's.
    sys.modules["fork_server"] = sys.modules["__main__"]
    serve(sys.argv[1], int(sys.argv[2]))
