"""Progress over the starts of a stage's jobs: whether they get further, or only use up their time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from hfprune_dist.store.heartbeat import Heartbeat


def fruitless_starts(progress: Sequence[dict[str, Any] | None]) -> int:
    """Return the number of fruitless starts since the last one that got further than all before it.

    A start that only regains lost ground after the work started over counts neither way: it is not fruitless, and it
    doesn't reset the count. So a job whose starts go back and forth comes to an end, too.

    Args:
        progress: the last heartbeats of all starts, oldest first; None for a start without one.
    """
    count = 0
    furthest: dict[str, int] = {}
    previous: dict[str, Any] | None = None
    for last in progress:
        if last is not None and last["done"] > furthest.get(last["phase"], -1 if furthest else 0):
            count = 0
        elif last is None or not _goes_on(last, previous):
            count += 1
        if last is not None:
            furthest[last["phase"]] = max(last["done"], furthest.get(last["phase"], 0))
            previous = last
    return count


def _goes_on(last: dict[str, Any], previous: dict[str, Any] | None) -> bool:
    """Return whether a start got further in the phase in which the previous one ended."""
    return previous is not None and previous["phase"] == last["phase"] and bool(last["done"] > previous["done"])


def as_progress(heartbeat: Heartbeat | None) -> dict[str, Any] | None:
    return None if heartbeat is None else asdict(heartbeat)
