"""Ranks without the seconds that imports take: forks of a process that has imported everything.

A launcher keeps one such warm process, and asks it for the ranks of one stage after another. For each request the
process forks a watcher, which forks the ranks, ends all of them when one fails, and reports their exit codes:

    launcher <- socket -> warm process -> watcher -> rank 0, rank 1, ...

Before the forks nothing is computed, no GPU is touched and no thread is started. Each rank gets the environment, folder
and output that its request names. Linux ends every process with the one that started it; elsewhere the watcher ends the
ranks once the launcher's end of the socket is closed. Where a fork is not safe it becomes a new interpreter: on macOS,
and if a library can't be imported, has started a thread or looked for GPUs. None of them imports from the current
folder.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NoReturn

from hfprune_dist.config.parameters import KINDS

IMPORTED = (*(f"hfprune_dist.stages.{kind}" for kind in KINDS), "lm_eval.evaluator")
# Imports start no threads and do not ask CUDA for GPUs; strings have the same hashes in the ranks of all launchers.
IMPORTING = {
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "OPENBLAS_NUM_THREADS": "1",
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "PYTHONHASHSEED": "0",
    "TORCHINDUCTOR_CACHE_DIR": os.curdir,  # torch would make a folder for compiled code, of which there is none
}
POLL_S = 0.02
# Time that ranks have to end after a signal.
GRACE_S = 10.0


def die_with_parent(parent: int | None = None) -> None:
    """Ask Linux to kill this process when the process that started it dies, for whatever reason.

    Args:
        parent: its id, if known; it may be dead by now.
    """
    parent = parent or os.getppid()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    if os.getppid() != parent:
        os._exit(1)


# In the launcher.


class WarmProcess:
    """A process that starts ranks as forks of itself. It begins with the first of them, and again if it was killed."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def start(
        self, main: str, arguments: Sequence[str], size: int, environment: Mapping[str, str], log: BinaryIO
    ) -> Ranks:
        """Start ranks that call a function.

        Args:
            main: ``module:function``.
            arguments: of the function, as a list.
            environment: of each rank, together with what torch.distributed needs (RANK, WORLD_SIZE, ...).
            log: receives the output of all ranks.
        """
        with Path(os.devnull).open("rb") as nothing:
            connection = self._connect([nothing.fileno(), log.fileno(), log.fileno()])
        request = json.dumps([main, list(arguments), size, dict(environment), str(Path.cwd())]).encode()
        with contextlib.suppress(OSError):  # as below
            connection.sendall(len(request).to_bytes(4, "big") + request)
        return Ranks(connection)

    def _connect(self, streams: Sequence[int]) -> socket.socket:
        """Return a connection to a new watcher, whose standard streams are the given files."""
        if self._process is None or self._process.poll() is not None:
            self._begin()
        assert self._control is not None
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(OSError):  # it has just been killed: then the connection is closed, too
            socket.send_fds(self._control, [b"."], [theirs.fileno(), *streams])
        return ours

    def _begin(self) -> None:
        self.close()
        self._control, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__, str(theirs.fileno()), str(os.getpid())],
                env={**IMPORTING, **os.environ},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches only the launcher, which then ends the ranks
            )

    def close(self) -> None:
        """End the process, and all ranks with it."""
        if self._process is not None and self._control is not None:
            self._control.close()
            self._process.kill()
            self._process.wait()
        self._process = None


class Ranks:
    """Ranks that have been started, as the launcher sees them.

    Attributes:
        codes: once they have ended, rank -> exit code, negative for a signal; without those that were ended because
            another had failed, and empty if their watcher was killed and they with it.
    """

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._told = b""
        self.codes: dict[int, int] = {}

    def ended(self, timeout: float) -> bool:
        """Wait for the end of all ranks, up to some seconds; return whether they have ended."""
        deadline = time.monotonic() + timeout
        while select.select([self._connection], [], [], max(0.0, deadline - time.monotonic()))[0]:
            content = received(self._connection, 1 << 16)
            self._told += content
            if not content or content.endswith(b"\n"):  # all that held the other end are gone; or the watcher's report
                self.codes = dict(json.loads(self._told or b"[]"))
                self._connection.close()
                return True
        return False

    def end(self) -> None:
        """Kill the ranks."""
        with contextlib.suppress(OSError, ValueError):  # they have just ended
            self._connection.shutdown(socket.SHUT_WR)
            self.ended(GRACE_S)


def received(connection: socket.socket, most: int) -> bytes:
    """Wait for some bytes; none if the other end is closed."""
    try:
        return connection.recv(most)
    except ConnectionError:
        return b""


# In the warm process and its watchers.


def serve(receive: Callable[[], Sequence[int]]) -> None:
    """Start ranks for one request after another, until there are no more.

    Args:
        receive: waits for a request and returns its open files: the connection, and the ranks' standard streams.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # watchers that have ended leave nothing behind
    parent, is_safe = os.getpid(), False
    while files := receive():
        connection, streams = socket.socket(fileno=files[0]), files[1:]
        if not is_safe and sys.platform == "linux":
            own = [os.dup(number) for number in range(len(streams))]
            _redirect(streams)  # what libraries say when they are imported is for the log of the first ranks
            with contextlib.suppress(Exception):  # a rank that needs what can't be imported says so itself
                import_everything()
                is_safe = len(list(Path("/proc/self/task").iterdir())) == 1
            _redirect(own)
        if os.fork() == 0:
            die_with_parent(parent)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _watch(connection, streams, is_safe)
            os._exit(0)
        connection.close()
        for stream in streams:
            os.close(stream)


def import_everything() -> None:
    gc.disable()  # searching the objects that imports make takes a quarter of their time
    for name in IMPORTED:
        importlib.import_module(name)
    sys.stdout.flush()
    sys.stderr.flush()
    gc.freeze()  # objects that are never collected stay shared with the forks
    gc.enable()


def _redirect(streams: Sequence[int]) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)


def _watch(connection: socket.socket, streams: Sequence[int], is_safe: bool) -> None:
    """Start the ranks that a launcher asks for, watch them, and report how they ended."""
    length = int.from_bytes(received(connection, 4), "big")
    request = b""
    while len(request) < length:
        request += received(connection, length - len(request)) or b" "
    main, arguments, size, environment, folder = json.loads(request)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    _redirect(streams)
    module, _, name = main.partition(":")

    def be_rank() -> None:
        if is_safe and not sys.modules["torch"].cuda._is_in_bad_fork():
            getattr(importlib.import_module(module), name)(arguments)
        else:
            call = f"import sys; from {module} import {name}; {name}(sys.argv[1:])"
            os.execv(sys.executable, [sys.executable, "-P", "-c", call, *arguments])

    codes = run_ranks(be_rank, size, connection)
    with contextlib.suppress(OSError):  # the launcher was killed
        connection.sendall(json.dumps(list(codes.items())).encode() + b"\n")


def run_ranks(main: Callable[[], None], size: int, orders: socket.socket | None = None) -> dict[int, int]:
    """Call a function on ranks that are forks of this process, and wait for all of them.

    Args:
        orders: each byte is a signal for all ranks; its end kills them.

    Returns:
        as ``Ranks.codes``.
    """
    from hfprune_dist.distributed.world import meeting_place

    with socket.create_server(("127.0.0.1", 0), backlog=size) as listener:
        place = os.getpid(), listener.getsockname()[1]
        running = {rank: _fork(main, rank, size, *place) for rank in range(size)}
        store = meeting_place(listener)  # has threads, and so comes after the forks
    codes: dict[int, int] = {}
    last_signal, deadline = 0, 0.0  # to those that run on although another has failed
    while running:
        if select.select([orders] if orders else [], [], [], POLL_S)[0]:
            assert orders is not None
            order = received(orders, 1)
            _signal(running, order[0] if order else signal.SIGKILL)
            orders = orders if order else None
        for rank, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[rank]
                code = os.waitstatus_to_exitcode(status)
                codes |= {rank: code} if not last_signal or -code != last_signal else {}
        if any(codes.values()) and time.monotonic() > deadline:
            last_signal = signal.SIGKILL if last_signal else signal.SIGTERM
            deadline = time.monotonic() + GRACE_S
            _signal(running, last_signal)
    del store
    return codes


def _signal(running: Mapping[int, int], number: int) -> None:
    for pid in running.values():
        os.kill(pid, number)  # it has not been waited for, so that the id is still its own


def _fork(main: Callable[[], None], rank: int, size: int, parent: int, port: int) -> int:
    """Call a function on a rank that is a fork of this process; return the rank's process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        die_with_parent(parent)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the watcher's
            "PYTHONUNBUFFERED": "1",
        }
        for stream in (sys.stdout, sys.stderr):
            stream.reconfigure(write_through=True)  # type: ignore[union-attr]
        main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def main() -> NoReturn:
    """Be a launcher's warm process: arguments are its end of a socket, and the launcher's process id."""
    control = socket.socket(fileno=int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    from hfprune_launch.stage.run import prepare_environment

    prepare_environment()
    serve(lambda: socket.recv_fds(control, 1, 4)[1])
    os._exit(0)


if __name__ == "__main__":
    main()
