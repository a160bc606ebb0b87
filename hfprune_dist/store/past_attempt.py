"""Attempts at stages, as recorded by the launchers that start them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hfprune_dist.store.stage import Stage


@dataclass(frozen=True)
class PastAttempt:
    """One attempt at a stage, from the records of the launcher that started it.

    Attributes:
        number: 1 for the first.
        started: unix time; None if it wasn't recorded.
        ended: unix time of its end, or of its last sign of life; None if there was none.
        state: ``open`` if no end is known: the attempt is queued, is running, or was cut off.
        cause: why it ended, in a word or two; empty if there is nothing to say.
        message: the reason in full.
        where: job and nodes; empty on this machine.
    """

    number: int
    state: Literal["done", "failed", "open"]
    started: float | None
    ended: float | None
    cause: str = ""
    message: str = ""
    where: str = ""
    logs: tuple[Path, ...] = ()


AttemptsOf = Callable[[Stage], Sequence[PastAttempt]]
