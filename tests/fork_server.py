"""Processes of this project without the seconds that imports take: forks of a server that has imported everything.

The server has computed nothing: it has one thread and no process group. Every process that it forks gets a session,
an environment, a folder, streams and seeds of its own, runs its script as ``__main__``, and starts its own project
processes in the same way; all but pytest's workers, whose tests start real ones as well. The server starts and watches
ranks with an agent that behaves as torchrun does, instead of torchrun. All kinds of stages but loraprune also run in an
interpreter of their own in at least one test: importance and evaluate under torchrun, distill and efficiency without
it, and all those of a whole sweep in Slurm jobs.

Since all forks share the server's hash seed and its environment at import time, real processes remain the reference.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
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
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from hfprune_launch.stage.parent import die_with_parent

from hfprune_dist.config.parameters import KINDS

FOLDER = Path(__file__).resolve().parent
TORCHRUN = "torch.distributed.run"
SCRIPTS = FOLDER.parent / "launch"
WORKER = FOLDER / "xdist_worker.py"
ADDRESS = "HFPRUNE_FORK_SERVER"  # set in processes that the server forks
EXECUTABLE = "HFPRUNE_EXECUTABLE"  # what they take for their Python, which they start jobs with
IMPORTED = (
    "torch.distributed",
    "transformers.integrations",
    "transformers.models.auto.modeling_auto",
    *(f"transformers.models.{family}.modeling_{family}" for family in ("llama", "mistral", "qwen2", "qwen3")),
    "transformers.tokenization_utils_tokenizers",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.comm.mori",
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "peft.utils.transformers_weight_conversion",
    "torch._inductor.compiler_bisector",
    "datasets",
    "lm_eval.evaluator",
    "lm_eval.tasks",
    "scipy.io",
    "rich.live",
    "hfprune_dist.evaluation.sharded_lm",
    "hfprune_dist.report.page",
    *(f"hfprune_dist.stages.{kind}" for kind in KINDS),
    *(f"hfprune_launch.{name}" for name in ("modes.sweep", "modes.compare", "stage.run", "slurm.job", "report")),
)
# Libraries that would start threads or query the network when they are imported.
QUIET = {
    "OMP_NUM_THREADS": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}
TERMINATION_GRACE_S = 10.0
POLL_S = 0.01


# Functions that tests use.


def forked(command: Sequence[str | Path]) -> list[str]:
    """Return ``python [-m torch.distributed.run ...] script.py ...`` as a command that runs in the fork server instead.

    Where a fork would not work the command stays as it is: a GPU's driver that has been queried does not survive one.
    """
    from hfprune_dist.store.machine import count_gpus

    command = [str(part) for part in command]
    if sys.platform != "linux" or count_gpus():
        return command
    return [sys.executable, "-IS", str(FOLDER / "fork_client.py"), _address(), *command[1:]]


@functools.cache
def _address() -> str:
    """Return the socket of a server that is ready, and start one if there is none."""
    address = os.environ.get(ADDRESS) or start()
    while not Path(address).exists():
        assert Path(address).parent.is_dir(), "the fork server is gone"
        assert not Path(address).with_name("failed").exists(), Path(address).with_name("log").read_text()
        time.sleep(0.05)
    return address


def start() -> str:
    """Return the socket of a new server, which appears once the server is ready; both end with this process."""
    folder = tempfile.TemporaryDirectory(prefix="hfprune-fork-server-")
    address, log = f"{folder.name}/socket", Path(folder.name, "log")
    with log.open("wb") as stream:
        server = subprocess.Popen(
            [sys.executable, __file__, address],
            env={**os.environ, **QUIET},
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )

    def stop() -> None:
        server.kill()
        server.wait()
        folder.cleanup()

    atexit.register(stop)
    return address


# The server.


@dataclass(frozen=True)
class Process:
    """A client's request: a script, its arguments and its surroundings; ``ranks`` where it runs under torchrun."""

    script: str
    arguments: list[str]
    environment: dict[str, str]
    folder: str
    ranks: int | None

    @classmethod
    def from_request(cls, arguments: Sequence[str], environment: dict[str, str], folder: str) -> Process:
        rest, ranks = list(arguments), None
        if rest[:2] == ["-m", TORCHRUN]:
            del rest[:2]
            options = [rest.pop(0) for _ in range(next(n for n, it in enumerate(rest) if it.endswith(".py")))]
            ranks = int(" ".join(options).partition("--nproc-per-node")[2].lstrip("= ").split()[0])
        return cls(rest[0], rest[1:], environment, folder, ranks)


def serve(address: str) -> NoReturn:
    """Import everything, then fork an agent for every connection."""
    die_with_parent()
    gc.disable()  # searching the objects that imports make takes a quarter of their time
    for name in IMPORTED:
        importlib.import_module(name)
    from transformers import conversion_mapping

    from hfprune_dist.store import provenance

    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # its thousand patterns are needed by every model
    provenance.environment()  # reads all metadata of packages
    assert len(list(Path("/proc/self/task").iterdir())) == 1, "a library has started a thread when it was imported"
    sys.stdout.flush()  # otherwise every fork would repeat what imports printed
    gc.freeze()  # objects that are never collected stay shared with the forks
    gc.enable()
    os.fsync = lambda _: None  # nothing in a fork has to survive a crash, and each call waits for the disk
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"{address}.new")
        listener.listen(64)
        Path(f"{address}.new").rename(address)  # only now, because clients connect at once
        signal.signal(signal.SIGCHLD, _reap)
        while True:
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                _be_agent(connection)
            connection.close()


def _reap(*_: object) -> None:
    with contextlib.suppress(ChildProcessError):
        while os.waitpid(-1, os.WNOHANG)[0]:
            pass


def _be_agent(client: socket.socket) -> NoReturn:
    """Run what a client asks for and report how that ended; if the client is gone, end it."""
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setsid()
        die_with_parent()
        header, streams, _, _ = socket.recv_fds(client, 4, 3)
        request = b""
        while len(request) < int.from_bytes(header, "big"):
            request += client.recv(1 << 20)
        told = json.loads(request)
        process = Process.from_request(told["arguments"], told["environment"], told["folder"])
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
            os.close(stream)
        code = _watch_ranks(process, client) if process.ranks else _watch_one(process, client)
        with contextlib.suppress(BrokenPipeError):  # where the client was killed
            client.sendall(code.to_bytes(4, "big", signed=True))
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(1)


def _watch_one(process: Process, client: socket.socket) -> int:
    child = _fork(lambda: _be(process, client))
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if (number := _signal_from(client)) is not None:
            os.kill(child, number)


def _signal_from(client: socket.socket) -> int | None:
    """Wait a moment for a signal that the client passes on and return it; SIGKILL if the client is gone."""
    if not select.select([client], [], [], POLL_S)[0]:
        return None
    return (client.recv(1) or bytes([signal.SIGKILL]))[0]


# Ranks, started and watched as torchrun would start and watch them.


def _watch_ranks(process: Process, client: socket.socket) -> int:
    """Start all ranks; when one fails or a signal comes, end the others. Return torchrun's exit code."""
    from torch.distributed import TCPStore

    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    port = listener.getsockname()[1]
    ranks = [_fork(lambda rank=rank: _be_rank(rank, port, process, client, listener)) for rank in range(process.ranks)]
    store = TCPStore("127.0.0.1", port, is_master=True, master_listen_fd=listener.detach(), wait_for_workers=False)
    codes: dict[int, int] = {}
    first = None
    while first is None and len(codes) < len(ranks):
        if (number := _signal_from(client)) is not None:
            _end(ranks, codes, number)
            return -number
        codes |= _ended(ranks, codes)
        first = next((rank for rank, code in codes.items() if code), None)
    if first is None:
        del store
        return 0
    _end(ranks, codes, signal.SIGTERM)
    failed = [first, *(rank for rank, code in sorted(codes.items()) if code and rank != first)]
    print(_summary(process.script, [(rank, ranks[rank], codes[rank]) for rank in failed]), file=sys.stderr, flush=True)
    return 1


def _ended(ranks: Sequence[int], known: dict[int, int]) -> dict[int, int]:
    """Return rank -> exit code, for ranks that have ended and aren't in ``known``."""
    codes = {}
    for rank, pid in enumerate(ranks):
        if rank not in known:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                codes[rank] = os.waitstatus_to_exitcode(status)
    return codes


def _end(ranks: Sequence[int], codes: dict[int, int], number: int) -> None:
    """End the ranks that still run and record their exit codes."""
    deadline = time.monotonic() + TERMINATION_GRACE_S
    for rank, pid in enumerate(ranks):
        if rank not in codes:
            os.kill(pid, number)
    while len(codes) < len(ranks):
        codes |= _ended(ranks, codes)
        if time.monotonic() > deadline:
            for rank in set(range(len(ranks))) - set(codes):
                os.kill(ranks[rank], signal.SIGKILL)
        time.sleep(POLL_S)


def _summary(script: str, failures: Sequence[tuple[int, int, int]]) -> str:
    """Return torchrun's summary of ranks that failed, with the first failure last.

    Args:
        failures: rank, process id and exit code of each failed rank.
    """
    entries = []
    for number, (rank, pid, code) in enumerate(failures):
        told = "To enable traceback see: https://pytorch.org/docs/stable/elastic/errors.html"
        if code < 0:
            told = f"Signal {-code} ({signal.Signals(-code).name}) received by PID {pid}"
        lines = [f"[{number}]:", f"  rank      : {rank} (local_rank: {rank})", f"  exitcode  : {code} (pid: {pid})"]
        entries.append("\n".join([*lines, "  error_file: <N/A>", f"  traceback : {told}"]))
    others = "\n".join(entries[1:]) or "  <NO_OTHER_FAILURES>"
    return f"{script} FAILED\nFailures:\n{others}\nRoot Cause (first observed failure):\n{entries[0]}"


def _be_rank(rank: int, port: int, process: Process, client: socket.socket, listener: socket.socket) -> NoReturn:
    listener.close()
    process.environment.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(process.ranks),
        LOCAL_WORLD_SIZE=str(process.ranks),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    _be(process, client)


# A forked process.


def _fork(child: Callable[[], Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        child()
    finally:
        os._exit(1)


def _be(process: Process, client: socket.socket) -> NoReturn:
    """Become the process: run the script and end as the interpreter does."""
    client.close()
    die_with_parent()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    _surround(process)
    code = _run(process)
    with contextlib.suppress(BaseException):
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _surround(process: Process) -> None:
    """Set the environment, folder, import paths and seeds."""
    import numpy as np

    os.environ.clear()
    os.environ.update(process.environment)
    os.environ[ADDRESS] = sys.argv[1]
    os.chdir(process.folder)
    sys.argv = [process.script, *process.arguments]
    sys.executable = process.environment.get(EXECUTABLE, sys.executable)
    sys.path[0] = str(Path(process.script).resolve().parent)
    given = process.environment.get("PYTHONPATH", "")
    sys.path[1:1] = [path for path in given.split(os.pathsep) if path]
    if given:
        sys.modules.pop("sitecustomize", None)
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")
    if process.environment.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    np.random.seed()  # unlike numpy, random reseeds itself
    if process.script != str(WORKER):
        subprocess.Popen = _Popen


class _Popen(subprocess.Popen):
    """Starts the project's own processes by the server, too."""

    def __init__(self, command: Any, *arguments: Any, **options: Any) -> None:
        if not isinstance(command, str) and _is_ours([str(part) for part in command]):
            command = forked(command)
        super().__init__(command, *arguments, **options)


def _is_ours(command: Sequence[str]) -> bool:
    script = next((part for part in command if part.endswith(".py")), "")
    starts = command[0] == sys.executable and (command[1] == script or command[1:3] == ["-m", TORCHRUN])
    return starts and Path(script).resolve().is_relative_to(SCRIPTS)


def _run(process: Process) -> int:
    """Return the exit code of the script, or minus the signal that ends it."""
    try:
        runpy.run_path(process.script, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        traceback.print_exc()
        return -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    try:
        serve(sys.argv[1])
    except BaseException:
        traceback.print_exc()
        Path(sys.argv[1]).with_name("failed").touch()
