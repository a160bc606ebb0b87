"""The settings that every section of the benchmark gets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Settings:
    """One run of the benchmark.

    Attributes:
        model: folder of a checkpoint.
        text: file with plain text, long enough for windows of ``tokens``.
        tokens: tokens per window.
        rounds: measured rounds of each comparison, over which medians are taken.
        quick: fewer points on every axis.
        scratch: an empty folder on the same disk as the results.
    """

    model: str
    text: str
    tokens: int
    rounds: int
    quick: bool
    scratch: Path
