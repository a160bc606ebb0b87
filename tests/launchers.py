"""Launchers without the seconds of their imports: forks of a process that has imported what they work with.

A fork is a launcher like any other: a process of its own, with its own arguments, environment and output, which may be
killed. What forks can't show is how the interpreter starts: some tests start ``launch/sweep.py`` itself.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace

from ranks import ROOT

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(
    [
        "pytest",  # the main module of the tests, which is imported in every fork
        "hfprune_launch.modes.sweep",
        "hfprune_dist.data.instructions",
        "hfprune_dist.data.tokenizer",
        "hfprune_dist.data.windows",
        "hfprune_dist.models.loading",
        "hfprune_dist.stages.evaluate",
        "hfprune_dist.stages.recover",
        "lm_eval.tasks",
        "transformers.models.llama.tokenization_llama",
    ]
)

# An exit code can be read once, which the start of any other process may do, too: threads take turns.
_turn = threading.Lock()


class Launcher(ABC):
    """A running ``launch/sweep.py``.

    Args:
        arguments: of its command line.
        environment: all of it.
    """

    @abstractmethod
    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None: ...

    @abstractmethod
    def end(self, seconds: float) -> tuple[int, str]:
        """Wait for its end, so long at most; exit code and output."""


class StartedLauncher(Launcher):
    """Started as a user starts it."""

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "sweep.py"), *arguments],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def end(self, seconds: float) -> tuple[int, str]:
        output, _ = self._process.communicate(timeout=seconds)
        return self._process.returncode, output


class ForkedLauncher(Launcher):
    """Forked from the process that has imported everything.

    Args:
        stages_here: run its stages on this machine in forks of the launcher, one rank each.
    """

    def __init__(self, arguments: Sequence[str], environment: Mapping[str, str], *, stages_here: bool = False) -> None:
        descriptor, name = tempfile.mkstemp(prefix="hfprune-launcher-")
        os.close(descriptor)
        self._output = Path(name)
        call = (list(arguments), dict(environment), self._output, stages_here)
        # A daemon, in multiprocessing's sense: it does not outlive the tests.
        self._process = _forks.Process(target=_launch, args=call, daemon=True)
        with _turn:
            self._process.start()

    def end(self, seconds: float) -> tuple[int, str]:
        deadline = time.monotonic() + seconds
        while (code := self._exit_code()) is None:
            assert time.monotonic() < deadline, f"still running after {seconds:.0f} s: {self._output.read_text()}"
            time.sleep(0.1)
        output = self._output.read_text()
        self._output.unlink()
        return code, output

    def _exit_code(self) -> int | None:
        with _turn:
            return self._process.exitcode


def end_launchers() -> None:
    """Kill all forks that still run; their tests were given up."""
    with _turn:
        for fork in multiprocessing.active_children():
            fork.kill()


def _launch(arguments: list[str], environment: dict[str, str], output: Path, stages_here: bool) -> None:
    """What the fork does: become the launcher that a shell would have started."""
    with output.open("wb") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    if "PYTHONPATH" in environment:
        sys.path[:0] = environment["PYTHONPATH"].split(os.pathsep)
        sys.modules.pop("sitecustomize", None)
        with suppress(ImportError):  # as in every interpreter
            importlib.import_module("sitecustomize")
    from hfprune_launch import sweep
    from hfprune_launch.modes import sweep_run
    from hfprune_launch.slurm import backend

    backend.LONGEST_WAIT_S = 3.0
    if stages_here:
        sweep_run.LocalBackend = _with_forked_ranks()
    sys.exit(sweep.main(arguments))


def _with_forked_ranks() -> type:
    """The local backend, whose ranks need no imports: each stage has one, a fork of the launcher."""
    from hfprune_launch.local.backend import LocalBackend

    class ForkingBackend(LocalBackend):
        def _start(self, stage, claim, log, scratch):
            child = os.fork()
            if child == 0:
                _run_rank(
                    self._environment(), log, [str(self._store.root.resolve()), stage.id, "--claim", claim.ticket]
                )
            return SimpleNamespace(poll=lambda: os.waitpid(child, os.WNOHANG)[0] or None)

    return ForkingBackend


def _run_rank(environment: Mapping[str, str], log: Path, arguments: list[str]) -> None:
    """In a fork: be the rank; does not return."""
    try:
        import torch
        from hfprune_launch.stage import run

        with log.open("wb") as stream:
            os.dup2(stream.fileno(), 1)
            os.dup2(stream.fileno(), 2)
        os.environ |= environment
        torch.set_num_threads(1)  # the parent's thread pool did not survive the fork
        sys.argv = ["run.py", *arguments]
        run.main()
    finally:
        os._exit(1)
