"""Files in which a running stage reports to others: a heartbeat and, on failure, the reason."""

from __future__ import annotations

import math
import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import listed, read_record, write_json

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
        began: unix time of the first report on this phase, by the clock of the latest; None in records older than this
            field.
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


class _Beginning(NamedTuple):
    """The first report on a phase: units done, and seconds of the clock."""

    phase: str
    done: int
    at: float


class Progress:
    """Writes the heartbeat of a stage, at most twice a second and at the end of each phase.

    Args:
        work: the stage's work folder; None writes nothing (all ranks but one).
        guard: called before each heartbeat; an exception that it raises ends the stage.
        clock: returns seconds since any moment; unlike the time of day, it can't be set.
    """

    def __init__(
        self,
        work: Path | None,
        guard: Callable[[], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._work = work
        self._guard = guard
        self._clock = clock
        self._written_at = -math.inf
        self._first: _Beginning | None = None

    def update(self, phase: str, done: int, total: int) -> None:
        """Report that ``done`` of ``total`` units of a phase are done; its pace is measured from the first call."""
        now = self._clock()
        first = self._first
        if first is None or first.phase != phase or done < first.done:
            first = self._first = _Beginning(phase, done, now)
        if self._work is None or (now - self._written_at < WRITE_INTERVAL_S and done < total):
            return
        if self._guard is not None:
            self._guard()
        self._written_at = now
        updated = time.time()
        beat = Heartbeat(phase, done, total, updated, began=updated - (now - first.at), done_before=first.done)
        write_json(self._work / PROGRESS, asdict(beat), durable=False)


def read_heartbeat(work: Path) -> Heartbeat | None:
    """The latest heartbeat in a work folder, None if none can be read."""
    return read_record(Heartbeat, work / PROGRESS)


@dataclass(frozen=True)
class Failure:
    """Why a stage ended early: ``cause`` is input (the user can fix it), lost input (an artifact must be made again),
    code (we must fix it), out of memory, or killed (from outside); a backend may give others, e.g. bad node.

    ``rank`` is -1 if the launcher noticed the failure, not a rank. ``attempt`` is the number of the attempt that
    failed; None in records older than this field.
    """

    cause: str
    message: str
    rank: int
    at: float
    attempt: int | None = None

    @property
    def is_consequence(self) -> bool:
        """Whether the rank failed only because it waited for another one, which died or hangs."""
        return self.cause == "code" and LOST_RANK.search(self.message) is not None

    def is_of(self, attempt: int, created: float) -> bool:
        """Whether the failure belongs to an attempt.

        Args:
            created: unix time of the attempt's beginning, for records that don't name their attempt.
        """
        return self.at >= created if self.attempt is None else self.attempt == attempt


def in_one_line(message: str) -> str:
    """The essence of a failure's message: the last line of a traceback, otherwise the first; the rest is from a log,
    which a colon announces.
    """
    lines = message.strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith(("Traceback", 'File "')) else 0].strip().removesuffix(":")


def write_failure(work: Path, error: BaseException, rank: int, attempt: int | None) -> None:
    """Record why a rank failed, for the launcher."""
    if isinstance(error, UserError):
        failure = Failure(error.CAUSE, str(error), rank, time.time(), attempt)
    else:
        message = "".join(traceback.format_exception(error)[-3:]).strip()
        cause = OUT_OF_MEMORY if _is_out_of_memory(error) else "code"
        failure = Failure(cause, message, rank, time.time(), attempt)
    write_failure_record(work, failure)


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says so: torch's for GPUs has a class of its own, that of its allocator for CPUs none."""
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or re.search("can(no|')t allocate memory|_STATUS_ALLOC_FAILED", str(error)) is not None


def write_failure_record(work: Path, failure: Failure) -> None:
    """Write a failure to the work folder, where the report finds it."""
    write_json(work / f"failure.{failure.rank}.json", asdict(failure))


def clear_failures(work: Path) -> None:
    """Remove the failures and the heartbeat of earlier attempts."""
    for file in [*listed(work, FAILURES), work / PROGRESS]:
        file.unlink(missing_ok=True)


def read_failures(work: Path) -> list[Failure]:
    """The failures recorded by the ranks and the launcher, the best explanation first.

    Bad input explains more than any error of ours, and errors that only report the loss of another rank explain least.
    Time decides only among equals, since the clocks of ranks on several hosts differ.
    """
    failures = [failure for file in listed(work, FAILURES) if (failure := read_record(Failure, file)) is not None]
    return sorted(failures, key=_order)


def _order(failure: Failure) -> tuple[bool, bool, bool, float, int]:
    ours = failure.cause in ("code", "killed")
    return not failure.cause.endswith("input"), ours, failure.is_consequence, failure.at, failure.rank


def read_failure(work: Path) -> Failure | None:
    """The failure that explains most, None if there is none."""
    return next(iter(read_failures(work)), None)
