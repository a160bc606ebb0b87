"""What a running stage reports to others: heartbeats and, if it fails, the reason."""

from __future__ import annotations

import math
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import write_json

PROGRESS = "progress.json"
FAILURES = "failure.*.json"
WRITE_INTERVAL_S = 0.5
OUT_OF_MEMORY = "out of memory"
# Error messages of the other ranks of a stage when one of them has died or hangs.
LOST_RANK = re.compile(
    r"closed by peer|connection (reset|refused)|broken pipe|remote process exited|recvvalue failed|gloo.*timeout"
    r"|\bsocket\b|timed out waiting|wait timeout|network error|distnetworkerror|failed to (recv|send|connect)"
    r"|seconds waiting for clients|failed to pass monitoredBarrier|caught collective operation timeout",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Heartbeat:
    """Latest report of a running stage: ``done`` of ``total`` units of the current phase, at unix time ``updated``.

    Attributes:
        began: unix time of the first report on this phase, by the clock of the latest.
        done_before: units that were already done at that time, perhaps in an earlier attempt.
    """

    phase: str
    done: int
    total: int
    updated: float
    began: float | None = None
    done_before: int = 0

    @property
    def seconds_left(self) -> float | None:
        """Seconds until the end of the phase, at its pace so far; None if there is no pace yet, or nothing left."""
        units = self.done - self.done_before
        if self.began is None or units <= 0 or self.done >= self.total:
            return None
        return (self.updated - self.began) * (self.total - self.done) / units

    def __str__(self) -> str:
        return f"{self.phase} {self.done}/{self.total}"


class Progress:
    """Writes the heartbeat of a stage, at most twice a second and at the end of each phase.

    Args:
        work: the stage's work folder; None writes nothing (all ranks but one).
        guard: called before each heartbeat; an exception that it raises ends the stage.
    """

    def __init__(self, work: Path | None, guard: Callable[[], object] | None = None) -> None:
        self._work = work
        self._guard = guard
        self._written_at = -math.inf
        # The first report on the current phase: its name, units done, and seconds of the clock.
        self._first: tuple[str, int, float] | None = None

    def update(self, phase: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` units of a phase are done; its pace is measured from the first call."""
        now = time.monotonic()  # which, unlike the time of day, nobody sets
        if self._first is None or self._first[0] != phase or done < self._first[1]:
            self._first = phase, done, now
        if self._work is None or (now - self._written_at < WRITE_INTERVAL_S and done < total):
            return
        if self._guard is not None:
            self._guard()
        self._written_at = now
        _, done_before, began = self._first
        updated = time.time()
        beat = Heartbeat(phase, done, total, updated, updated - (now - began), done_before)
        write_json(self._work / PROGRESS, asdict(beat), durable=False)


@dataclass(frozen=True)
class Failure:
    """Why a stage ended early: ``cause`` is input (the user can fix it), lost input (an artifact must be made again),
    code (we must fix it), out of memory, or killed (from outside); a backend may give others, e.g. bad node.

    ``rank`` is -1 if the launcher noticed the failure, not a rank. ``attempt`` is the number of the attempt that
    failed; None if it has none.
    """

    cause: str
    message: str
    rank: int
    at: float
    attempt: int | None = None

    @classmethod
    def from_error(cls, error: BaseException, rank: int, attempt: int | None) -> Failure:
        """The failure of a rank that an error ended."""
        if isinstance(error, UserError):
            return cls(error.CAUSE, str(error), rank, time.time(), attempt)
        message = "".join(traceback.format_exception(error)[-3:]).strip()
        return cls(OUT_OF_MEMORY if _is_out_of_memory(error) else "code", message, rank, time.time(), attempt)

    @property
    def is_consequence(self) -> bool:
        """Whether the rank failed only because it waited for another one, which died or hangs."""
        return self.cause == "code" and LOST_RANK.search(self.message) is not None

    @property
    def order(self) -> tuple[bool, bool, bool, float, int]:
        """Sorts failures, the best explanation first: bad input explains more than any error of ours, and errors that
        only report the loss of another rank explain least. Time decides only among equals: clocks of hosts differ.
        """
        ours = self.cause in ("code", "killed")
        return not self.cause.endswith("input"), ours, self.is_consequence, self.at, self.rank


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: torch's for GPUs has a class of its own, that of its allocator for CPUs none."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or re.search("can(no|')t allocate memory|_STATUS_ALLOC_FAILED", str(error)) is not None


def in_one_line(message: str) -> str:
    """The essence of a failure's message: the last line of a traceback, otherwise the first; the rest is from a log,
    which a colon announces.
    """
    lines = message.strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith(("Traceback", 'File "')) else 0].strip().removesuffix(":")
