"""Progress where there is no terminal, as under nohup or in a pipe: an occasional line for each running stage."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from hfprune_dist.store.stage import Stage

# Seconds between two lines about one stage, and before the first.
INTERVAL_S = 30.0


class ProgressLines:
    """Prints lines of progress, except on a terminal, which shows it in a better way.

    Args:
        clock: seconds of a monotonic clock.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._told_at: dict[str, float] = {}

    def tell(self, stage: Stage, progress: str, left: str) -> None:
        """Print how far a stage is, if a line is due; to be called on every sign of progress of a running stage.

        Args:
            progress: e.g. "calibration 3/9"; empty while the stage starts.
            left: the time left; empty if it isn't known.
        """
        now = self._clock()
        if self._console.is_terminal or now - self._told_at.setdefault(stage.id, now) < INTERVAL_S:
            return
        self._told_at[stage.id] = now
        remaining = f", {left} left" if left else ""
        line = f"{stage.kind} {stage.label}: {progress or 'starting'}{remaining}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
