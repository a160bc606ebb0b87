"""The file report.html in a sweep's folder: always written as a whole, by launchers and never by jobs."""

from __future__ import annotations

import os
import time
from pathlib import Path

from hfprune_launch.screen import say
from hfprune_launch.sweep_folder import recorded_sweep
from rich.console import Console

from hfprune_dist.store.atomic_files import write_text

REPORT = "report.html"


def write_page(out: Path, console: Console) -> None:
    """Write the report on all rows of a folder; nothing if no run has recorded any, or if it is another user's.

    If it can't be written, a note says so and a run goes on: the results are complete all the same.
    """
    from hfprune_dist.report.page import page

    try:
        sweep = recorded_sweep(out)
        if sweep is None or not os.access(out, os.W_OK):
            return
        write_text(out / REPORT, page(out, sweep.plan, sweep.rows(), time.time()))
    except Exception as error:  # whatever is wrong with the report, the sweep is fine
        say(console, f"note: {out / REPORT} can't be written ({type(error).__name__}: {error})")
