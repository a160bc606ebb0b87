"""The outcome of an attempt at a stage."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hfprune_dist.store.heartbeat import Failure


@dataclass(frozen=True)
class Outcome:
    """The outcome of an attempt at a stage; ``failure`` says why if it isn't done."""

    state: Literal["done", "failed"]
    seconds: float
    failure: Failure | None = None
