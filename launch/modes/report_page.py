"""The file report.html in a sweep's folder: always written as a whole, by launchers and never by jobs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hfprune_launch.screen import say
from hfprune_launch.stage.attempts import Ledger, past_attempts
from hfprune_launch.sweep_folder import recorded_sweep
from rich.console import Console

from hfprune_dist.report.evidence import collect
from hfprune_dist.store.atomic_files import write_text

REPORT = "report.html"
INTERVAL_S = 30.0


@dataclass
class ReportPage:
    """The report on a folder's rows, including those of earlier runs.

    If it can't be written, a note says so and the run goes on: the results are complete all the same.

    Args:
        out: folder of the sweep.
        console: where that note is printed.
        clock: seconds since an arbitrary moment.
    """

    out: Path
    console: Console
    clock: Callable[[], float] = time.monotonic
    _written: float | None = field(default=None, init=False)

    def refresh(self) -> None:
        """Write the report unless it was written within the last half minute."""
        if self._written is None or self.clock() - self._written >= INTERVAL_S:
            self.write()

    def write(self) -> None:
        """Write the report; do nothing if no run has recorded its rows in the folder, or if it is another user's."""
        self._written = self.clock()
        try:
            self._write()
        except Exception as error:  # whatever is wrong with the report, the sweep is fine
            say(self.console, f"note: {self.out / REPORT} can't be written ({type(error).__name__}: {error})")

    def _write(self) -> None:
        from hfprune_dist.report.page import page

        sweep = recorded_sweep(self.out)
        if sweep is None or not os.access(self.out, os.W_OK):
            return
        ledger, logs = Ledger(sweep.store), self.out / "logs"
        evidence = collect(
            self.out, sweep.plan, sweep.rows(), lambda stage: past_attempts(ledger, stage.id, logs), time.time()
        )
        write_text(self.out / REPORT, page(evidence))
