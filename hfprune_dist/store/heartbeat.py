"""Heartbeats, by which a running stage reports to others."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hfprune_dist.store.atomic_files import write_json

PROGRESS = "progress.json"
WRITE_INTERVAL_S = 0.5


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
    """Writes the heartbeat of a stage to its work folder, at most twice a second and at the end of each phase; without
    a folder, as on all ranks but one, nothing. ``guard`` is called before each: an exception that it raises ends the
    stage.
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
