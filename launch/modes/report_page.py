"""report.html in the folder of a sweep: written whole by launchers, never by jobs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hfprune_launch.modes.past_attempts import past_attempts
from hfprune_launch.screen import say
from hfprune_launch.sweep_folder import read_record
from rich.console import Console

from hfprune_dist.report.evidence import collect
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import write_text

REPORT = "report.html"
INTERVAL_S = 30.0


@dataclass
class ReportPage:
    """The report of the rows that a folder has, those of earlier runs included.

    A report that can't be written is said to be so and ends nothing: results are there all the same.

    Args:
        out: folder of the sweep.
        console: where it is said.
        clock: seconds since any moment.
    """

    out: Path
    console: Console
    clock: Callable[[], float] = time.monotonic
    _written: float | None = field(default=None, init=False)

    def refresh(self) -> None:
        """Write it where it was not written within the last half minute."""
        if self._written is None or self.clock() - self._written >= INTERVAL_S:
            self.write()

    def write(self) -> None:
        """Write it; nothing where no run has left its rows in the folder."""
        self._written = self.clock()
        try:
            self._write()
        except Exception as error:  # whatever is wrong with it, the sweep is not
            say(self.console, f"note: {self.out / REPORT} can't be written ({type(error).__name__}: {error})")

    def _write(self) -> None:
        from hfprune_dist.report.page import page

        record = read_record(self.out)
        if record is None:
            return
        attempts_of = past_attempts(self.out)
        rows = record.rows(Store(self.out / "store"), attempts_of)
        evidence = collect(self.out, record.plan, rows, attempts_of, time.time())
        write_text(self.out / REPORT, page(evidence))
