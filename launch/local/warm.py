"""Ranks without the seconds that imports take: forks of a process that has imported everything.

A launcher keeps one such warm process, and asks it for the ranks of one stage after another:

    launcher <- a request, exit codes -> warm process -> rank 0, rank 1, ...

Before the forks nothing is computed, no GPU is touched and no thread is started. Linux ends every process with the one
that started it; elsewhere the warm process ends its ranks once the launcher has closed the connection. Where a fork is
not safe it becomes a new interpreter: on macOS, and if a library can't be imported, has started a thread or looked for
GPUs. None of them imports from the current folder.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import ClassVar, NoReturn

from hfprune_launch.stage.run import die_with_parent, prepare_environment, quick_imports

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


# In the launcher.


class WarmProcess:
    """A process that starts ranks as forks of itself. It begins with the first of them, or before, and again if it was
    killed.
    """

    PROGRAM: ClassVar = ("-m", __name__)

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def begin(self) -> None:
        """Begin to import what ranks need, before they are wanted."""
        if self._connection is not None:
            return
        self._connection, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", *self.PROGRAM, str(theirs.fileno()), str(os.getpid())],
                env={**IMPORTING, **os.environ},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C reaches only the launcher, which then ends the ranks
            )

    def start(self, main: str, arguments: Sequence[str], size: int, environment: Mapping[str, str], log: Path) -> None:
        """Start ranks that call a function, ``module:function``, with a list of arguments, once those before them have
        ended. To the environment is added what torch.distributed needs (RANK, WORLD_SIZE, ...), to the log what ranks
        print.
        """
        if self._connection is not None and self._connection.poll():
            self.close()  # it says nothing when nothing runs: it was killed
        self.begin()
        assert self._connection is not None
        request = (main, list(arguments), size, dict(environment), Path.cwd(), log.resolve())
        with contextlib.suppress(OSError):  # it has just been killed, as ``ended`` will find
            self._connection.send(request)

    def ended(self, timeout: float) -> dict[int, int] | None:
        """Wait for the end of all ranks, up to some seconds; return rank -> exit code, negative for a signal, or None
        if they go on. Ranks that were ended because another had failed aren't there, and none is if the process was
        killed.
        """
        assert self._connection is not None, "no ranks were started"
        if not self._connection.poll(timeout):
            return None
        try:
            return dict(self._connection.recv())
        except (EOFError, OSError):
            self.close()
            return {}

    def close(self) -> None:
        """End the process, and all ranks with it."""
        if self._connection is None:
            return
        with contextlib.suppress(OSError):  # it has just ended
            self._connection.send(None)
        if self._process is not None and sys.platform == "linux":
            self._process.kill()  # while it imports, it doesn't listen
        with contextlib.suppress(EOFError, OSError):
            while self._connection.poll(GRACE_S):  # until it and its forks, which hold the other end too, are gone
                self._connection.recv()
        self._connection.close()
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None


# In the warm process.


def serve(launcher: Connection) -> None:
    """Run the ranks of one request after another, until the launcher sends nothing more or is gone."""
    is_safe = sys.platform == "linux" and _has_imported_safely()
    with contextlib.suppress(EOFError, ConnectionError):  # the launcher was killed
        while request := launcher.recv():
            main, arguments, size, environment, folder, log = request
            with log.open("ab") as stream:
                os.dup2(stream.fileno(), 1)
                os.dup2(stream.fileno(), 2)
            be_rank = partial(_be_rank, main, arguments, folder, is_safe)
            launcher.send(run_ranks(be_rank, size, environment, launcher))


def _be_rank(main: str, arguments: list[str], folder: Path, is_safe: bool) -> None:
    os.chdir(folder)
    module, _, name = main.partition(":")
    if is_safe and not sys.modules["torch"].cuda._is_in_bad_fork():
        getattr(importlib.import_module(module), name)(arguments)
    else:
        call = f"import sys; from {module} import {name}; {name}(sys.argv[1:])"
        os.execv(sys.executable, [sys.executable, "-P", "-c", call, *arguments])


def import_everything() -> None:
    with quick_imports():  # objects that are never collected stay shared with the forks
        for name in IMPORTED:
            importlib.import_module(name)
    sys.stdout.flush()
    sys.stderr.flush()


def _has_imported_safely() -> bool:
    with contextlib.suppress(Exception):  # a rank that needs what can't be imported says so itself
        import_everything()
        return len(list(Path("/proc/self/task").iterdir())) == 1
    return False


def run_ranks(
    main: Callable[[], None], size: int, environment: Mapping[str, str], launcher: Connection | None = None
) -> dict[int, int]:
    """Call a function on ranks that are forks of this process, and wait for all; return what ``WarmProcess.ended``
    does. The end of the connection to the ``launcher`` kills the ranks.
    """
    from hfprune_dist.distributed.world import meeting_place

    with socket.create_server(("127.0.0.1", 0), backlog=size) as listener:
        shared = {
            **environment,
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(listener.getsockname()[1]),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # this process's
            "PYTHONUNBUFFERED": "1",
        }
        running = {rank: _fork(main, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(size)}
        store = meeting_place(listener)  # has threads, and so comes after the forks; they end with it
    codes: dict[int, int] = {}
    last_signal, deadline = 0, 0.0  # to those that run on although another has failed
    while running:
        number = 0
        if launcher is None:
            time.sleep(POLL_S)
        elif launcher.poll(POLL_S):
            launcher, number = None, signal.SIGKILL
        for rank, pid in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[rank]
                code = os.waitstatus_to_exitcode(status)
                codes |= {rank: code} if not last_signal or -code != last_signal else {}
        if any(codes.values()) and time.monotonic() > deadline:
            last_signal = number = signal.SIGKILL if last_signal else signal.SIGTERM
            deadline = time.monotonic() + GRACE_S
        for pid in running.values() if number else ():
            os.kill(pid, number)  # it has not been waited for, so that the id is still its own
    del store
    return codes


def _fork(main: Callable[[], None], environment: Mapping[str, str]) -> int:
    """Call a function in a fork of this process; return the fork's process id."""
    parent = os.getpid()
    if pid := os.fork():
        return pid
    code = 1
    try:
        die_with_parent(parent)
        os.environ.clear()
        os.environ.update(environment)
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


def be_warm_process() -> NoReturn:
    """Be a launcher's warm process: arguments are its end of a connection, and the launcher's process id."""
    launcher = Connection(int(sys.argv[1]))
    die_with_parent(int(sys.argv[2]))
    prepare_environment()
    serve(launcher)
    os._exit(0)


if __name__ == "__main__":
    be_warm_process()
