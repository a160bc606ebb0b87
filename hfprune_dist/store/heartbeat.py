"""What a running stage tells the outside: a heartbeat file, and on failure a file that says why."""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import listed, read_record, write_json

PROGRESS = "progress.json"
FAILURES = "failure.*.json"
WRITE_INTERVAL_S = 0.5
# What the other ranks of a stage say when one of them has died or hangs.
LOST_RANK = re.compile(
    r"closed by peer|connection (reset|refused)|broken pipe|remote process exited|recvvalue failed|gloo.*timeout"
    r"|\bsocket\b|timed out waiting|wait timeout|network error|distnetworkerror|failed to (recv|send|connect)"
    r"|seconds waiting for clients|failed to pass monitoredBarrier|caught collective operation timeout",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Heartbeat:
    """Last word of a running stage: ``done`` of ``total`` units of the current phase, at unix time ``updated``.

    Attributes:
        began: unix time of the first word about this phase; None in records of before there was this field.
        done_before: units that were done by then, some of them perhaps in an earlier attempt.
    """

    phase: str
    done: int
    total: int
    updated: float
    began: float | None = None
    done_before: int = 0

    @property
    def seconds_left(self) -> float | None:
        """Until the end of the phase, at its pace so far; None where there is no pace yet, or nothing left."""
        units = self.done - self.done_before
        if self.began is None or units <= 0 or self.done >= self.total:
            return None
        return (self.updated - self.began) * (self.total - self.done) / units

    def __str__(self) -> str:
        return f"{self.phase} {self.done}/{self.total}"


class Progress:
    """Writes the heartbeat of a stage, at most twice a second.

    Args:
        work: the stage's work folder; None keeps silent (all ranks but one).
        guard: called before each heartbeat; what it raises ends the stage.
    """

    def __init__(self, work: Path | None, guard: Callable[[], None] | None = None) -> None:
        self._work = work
        self._guard = guard
        self._written_at = 0.0
        self._first: Heartbeat | None = None

    def update(self, phase: str, done: int, total: int) -> None:
        """Say that ``done`` of ``total`` units of a phase are done; the first call in a phase sets its pace's start."""
        now = time.time()
        first = self._first
        if first is None or first.phase != phase or done < first.done:
            first = self._first = Heartbeat(phase, done, total, now)
        since = now - self._written_at
        if self._work is None or (0 <= since < WRITE_INTERVAL_S and done < total):
            return
        if self._guard is not None:
            self._guard()
        self._written_at = now
        write_json(self._work / PROGRESS, asdict(Heartbeat(phase, done, total, now, first.updated, first.done)))


def read_heartbeat(work: Path) -> Heartbeat | None:
    """The last heartbeat in a work folder, None where there is none that can be read."""
    return read_record(Heartbeat, work / PROGRESS)


@dataclass(frozen=True)
class Failure:
    """Why a stage ended early: ``cause`` is input (the user can fix it), lost input (an artifact must be made again),
    code (we must fix it) or killed (from outside); a backend may know more, e.g. node failure.

    ``rank`` is -1 where the launcher noticed, not a rank. ``attempt`` is the number of the attempt that failed; None
    in records of before there was this field.
    """

    cause: str
    message: str
    rank: int
    at: float
    attempt: int | None = None

    @property
    def is_consequence(self) -> bool:
        """Whether the rank failed because it waited for another one, which died or hangs."""
        return self.cause == "code" and LOST_RANK.search(self.message) is not None

    def is_of(self, attempt: int, created: float) -> bool:
        """Whether it belongs to an attempt.

        Args:
            created: unix time of the attempt's beginning, for records that don't say to which attempt they belong.
        """
        return self.at >= created if self.attempt is None else self.attempt == attempt


def in_one_line(message: str) -> str:
    """What a failure's message comes to: a traceback's last line, else its first; the rest is the end of a log."""
    lines = message.strip().splitlines() or [""]
    return lines[-1 if lines[0].startswith(("Traceback", 'File "')) else 0].strip()


def write_failure(work: Path, error: BaseException, rank: int, attempt: int | None) -> None:
    """Leave the reason of a failed rank for the launcher."""
    if isinstance(error, UserError):
        failure = Failure(error.CAUSE, str(error), rank, time.time(), attempt)
    else:
        message = "".join(traceback.format_exception(error)[-3:]).strip()
        failure = Failure("code", message, rank, time.time(), attempt)
    write_failure_record(work, failure)


def write_failure_record(work: Path, failure: Failure) -> None:
    """Leave a failure in the work folder, where the report finds it."""
    write_json(work / f"failure.{failure.rank}.json", asdict(failure))


def clear_failures(work: Path) -> None:
    """Forget the failures of earlier attempts."""
    for file in [*listed(work, FAILURES), work / PROGRESS]:
        file.unlink(missing_ok=True)


def read_failures(work: Path) -> list[Failure]:
    """What the ranks and the launcher have left, the best explanation first.

    Bad input explains more than any error of ours, and errors that say of themselves that another rank was lost explain
    least. Only among equals does time decide, since ranks on several hosts have several clocks.
    """
    failures = [failure for file in listed(work, FAILURES) if (failure := read_record(Failure, file)) is not None]
    return sorted(failures, key=_order)


def _order(failure: Failure) -> tuple[bool, bool, bool, float, int]:
    ours = failure.cause in ("code", "killed")
    return not failure.cause.endswith("input"), ours, failure.is_consequence, failure.at, failure.rank


def read_failure(work: Path) -> Failure | None:
    """The failure that explains most, None where there is none."""
    return next(iter(read_failures(work)), None)
