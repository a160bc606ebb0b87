"""Causes of the deaths of local ranks, inferred from what they left and what torchrun says in their log."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hfprune_launch.stage.logs import end_of_log

from hfprune_dist.store.heartbeat import LOST_RANK, Failure

LOG_TAIL_LINES = 12
# The end of a log that holds the last words of all ranks of a machine, and torchrun's summary after them.
LOG_END_BYTES = 2**20
# torchrun's summary of a rank that a signal ended; the lines between are its exit code and its error file.
_SIGNAL = re.compile(
    r"^ *rank +: (?P<rank>\d+) .*\n(?:.*\n){1,3}? *traceback : Signal \d+ \((?P<signal>SIG\w+)\) received by PID",
    re.MULTILINE,
)
# Signals from outside: from the kernel if memory is short or a page of a mapped file is gone, a scheduler or a user.
FROM_OUTSIDE = ("SIGKILL", "SIGBUS")
BY_ITSELF = ("SIGSEGV", "SIGABRT", "SIGILL", "SIGFPE")
# Message of gloo before it aborts the process because another rank sent something other than expected.
OUT_OF_STEP = "op.preamble.length <= op.nbytes"


@dataclass(frozen=True)
class Death:
    """A rank, and the name of the signal that ended it."""

    rank: int
    signal: str

    def __str__(self) -> str:
        return f"rank {self.rank} by {self.signal}"


def explain_death(left: Failure | None, log: Path, attempt: int) -> Failure:
    """Return why an attempt failed.

    Args:
        left: the most informative failure that the ranks left; None if they left none.
        log: log of all ranks and of torchrun.
    """
    if left is not None and left.cause != "code":
        return left
    text = end_of_log(log, LOG_END_BYTES)
    deaths = [Death(int(found["rank"]), found["signal"]) for found in _SIGNAL.finditer(text)]
    killed = [death for death in deaths if death.signal in FROM_OUTSIDE]
    crashed = [death for death in deaths if death.signal in BY_ITSELF]
    ending = f"\n{log} ends with:\n{_tail(text)}"
    if killed:  # the surviving ranks then fail too, in a collective
        return _noticed("killed", f"a rank died without a message: {_listed(killed)}, from outside{ending}", attempt)
    if left is not None and not left.is_consequence:
        return left
    if crashed:
        return _noticed("code", f"{_crash(crashed, text)}{ending}", attempt)
    if left is not None:
        return replace(left, message=f"a rank was lost or hangs, and rank {left.rank} waited for it:\n{left.message}")
    return _noticed("killed", f"a rank died without a message{ending}", attempt)


def _crash(crashed: Sequence[Death], text: str) -> str:
    if OUT_OF_STEP in text:
        return f"the ranks did not make the same collective calls, and gloo ended {_listed(crashed)} ({OUT_OF_STEP})"
    if any(death.signal == "SIGABRT" for death in crashed) and LOST_RANK.search(text):
        return f"a rank was lost or hangs, and gloo ended what waited for it: {_listed(crashed)}"
    return f"a rank crashed: {_listed(crashed)}"


def _noticed(cause: str, message: str, attempt: int) -> Failure:
    return Failure(cause, message, -1, time.time(), attempt)


def _listed(deaths: Sequence[Death]) -> str:
    return ", ".join(str(death) for death in sorted(deaths, key=lambda death: death.rank))


def _tail(text: str) -> str:
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(f"  {line}" for line in lines[-LOG_TAIL_LINES:])
