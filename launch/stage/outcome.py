"""How an attempt at a stage ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hfprune_dist.store.heartbeat import Failure


@dataclass(frozen=True)
class Outcome:
    """How an attempt at a stage ended; ``failure`` says why if it isn't done."""

    state: Literal["done", "failed"]
    seconds: float
    failure: Failure | None = None
