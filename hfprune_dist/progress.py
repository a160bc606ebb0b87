"""What a running stage tells the outside: a heartbeat file, and on failure a file that says why."""

from __future__ import annotations

import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path

from hfprune_dist.errors import UserError
from hfprune_dist.files import read_json, write_json

PROGRESS = "progress.json"
WRITE_INTERVAL_S = 0.5


@dataclass(frozen=True)
class Heartbeat:
    """Last word of a running stage: ``done`` of ``total`` units of the current phase, at unix time ``updated``."""

    phase: str
    done: int
    total: int
    updated: float


class Progress:
    """Writes the heartbeat of a stage, at most twice a second.

    Args:
        work: the stage's work folder; None keeps silent (all ranks but one).
    """

    def __init__(self, work: Path | None) -> None:
        self._work = work
        self._written_at = 0.0

    def update(self, phase: str, done: int, total: int) -> None:
        now = time.time()
        if self._work is None or (now - self._written_at < WRITE_INTERVAL_S and done < total):
            return
        self._written_at = now
        write_json(self._work / PROGRESS, asdict(Heartbeat(phase, done, total, now)))


def read_heartbeat(work: Path) -> Heartbeat | None:
    """The last heartbeat in a work folder, None where there is none."""
    record = read_json(work / PROGRESS)
    return None if record is None else Heartbeat(**record)


@dataclass(frozen=True)
class Failure:
    """Why a stage ended early: ``cause`` is input (the user can fix it), lost input (an artifact must be made again),
    code (we must fix it) or killed (from outside); a backend may know more, e.g. node failure.

    ``rank`` is -1 where the launcher noticed, not a rank.
    """

    cause: str
    message: str
    rank: int
    at: float


def write_failure(work: Path, error: BaseException, rank: int) -> None:
    """Leave the reason of a failed rank for the launcher."""
    if isinstance(error, UserError):
        failure = Failure(error.CAUSE, str(error), rank, time.time())
    else:
        failure = Failure("code", "".join(traceback.format_exception(error)[-3:]).strip(), rank, time.time())
    write_failure_record(work, failure)


def write_failure_record(work: Path, failure: Failure) -> None:
    """Leave a failure in the work folder, where the report finds it."""
    write_json(work / f"failure.{failure.rank}.json", asdict(failure))


def clear_failures(work: Path) -> None:
    """Forget the failures of earlier attempts."""
    for file in [*work.glob("failure.*.json"), work / PROGRESS]:
        file.unlink(missing_ok=True)


def read_failure(work: Path) -> Failure | None:
    """The failure that came first: the others are its consequences. Bad input explains more than any of them."""
    failures = [Failure(**read_json(file)) for file in work.glob("failure.*.json")]
    return min(failures, key=lambda failure: (not failure.cause.endswith("input"), failure.at), default=None)
