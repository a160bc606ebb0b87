"""Progress for who has no terminal, as under nohup or in a pipe: now and then a line for each stage that runs."""

from __future__ import annotations

import time
from collections.abc import Callable

from rich.console import Console

from hfprune_dist.store.stage import Stage

# So many seconds lie between two lines about one stage, and before the first.
INTERVAL_S = 30.0


class ProgressLines:
    """Prints progress; nothing on a terminal, which has something better.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._told_at: dict[str, float] = {}

    def tell(self, stage: Stage, progress: str, left: str) -> None:
        """Say how far a stage is where it is time to; to be called whenever something is known of a running stage.

        Args:
            progress: such as "calibration 3/9"; empty while it starts.
            left: the time left; empty where it isn't known.
        """
        now = self._clock()
        if self._console.is_terminal or now - self._told_at.setdefault(stage.id, now) < INTERVAL_S:
            return
        self._told_at[stage.id] = now
        remaining = f", {left} left" if left else ""
        line = f"{stage.kind} {stage.label}: {progress or 'starting'}{remaining}"
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
