"""Attempts at stages, as those who start them know of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from hfprune_dist.store.stage import Stage


@dataclass(frozen=True)
class Attempt:
    """One attempt at a stage, as the records of who started it tell.

    Attributes:
        number: 1 for the first.
        started, ended: unix time; None where nobody has written it down, or where it hasn't come yet.
        state: ``open`` where no end is known: it is queued, runs, or was cut off.
        cause: why it ended, in a word or two; empty where there is nothing to say.
        message: the reason at length.
        where: job and nodes; empty on this machine.
        ranks: None where nobody has written it down.
    """

    number: int
    state: Literal["done", "failed", "open"]
    started: float | None
    ended: float | None
    cause: str = ""
    message: str = ""
    where: str = ""
    logs: tuple[Path, ...] = ()
    ranks: int | None = None


AttemptsOf = Callable[[Stage], Sequence[Attempt]]
