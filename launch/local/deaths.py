"""Why ranks on this machine left no artifact, from what they recorded and from how their processes ended."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from hfprune_launch.stage.attempts import end_of_log

from hfprune_dist.store.heartbeat import Failure

LOG_TAIL_LINES = 12
LOG_END_BYTES = 2**14
# Signals of a process to itself. All others come from outside: from the kernel if memory is short or a page of a mapped
# file is gone, a scheduler or a user.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)


def explain_death(left: Failure | None, codes: Mapping[int, int], log: Path, attempt: int) -> Failure:
    """Return why an attempt failed.

    Args:
        left: the most informative failure that the ranks left; None if they left none.
        codes: rank -> exit code, negative for a signal; empty if the process that started the ranks died with them.
        log: log of all ranks.
    """
    if left is not None and left.cause != "code":
        return left
    signals = {rank: signal.Signals(-code) for rank, code in sorted(codes.items()) if code < 0}
    deaths = ", ".join(f"rank {rank} by {number.name}" for rank, number in signals.items())
    lines = [line for line in end_of_log(log, LOG_END_BYTES).splitlines() if line.strip()]
    ending = "\n  ".join([f"\n{log} ends with:", *lines[-LOG_TAIL_LINES:]])

    def noticed(cause: str, message: str) -> Failure:
        return Failure(cause, f"{message}{ending}", -1, time.time(), attempt)

    if set(signals.values()) - set(CRASHES):  # the surviving ranks then fail too, in a collective
        return noticed("killed", f"a rank died without a message: {deaths}, from outside")
    if not codes:
        return noticed("killed", "a rank died without a message: the process that started all ranks died")
    if left is not None and not left.is_consequence:
        return left
    if signals:
        return noticed("code", f"a rank crashed: {deaths}")
    if left is not None:
        return replace(left, message=f"a rank was lost or hangs, and rank {left.rank} waited for it:\n{left.message}")
    ends = ", ".join(f"rank {rank} with exit code {code}" for rank, code in codes.items() if code)
    return noticed("killed", f"a rank died without a message: {ends or 'all ended as if they had succeeded'}")
