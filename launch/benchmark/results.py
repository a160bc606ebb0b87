"""Findings of a benchmark: lines of a table, and charts, which can be written as JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from hfprune_dist.results.markdown import table_of_texts


@dataclass(frozen=True)
class Line:
    """One row of the table.

    Attributes:
        unit: what ``value`` is a multiple of, e.g. "forwards"; or "share", "s", "count".
        target: value that was aimed at, in the same unit; None if there was none.
    """

    section: str
    what: str
    value: float
    unit: str
    target: float | None = None


@dataclass(frozen=True)
class Chart:
    """Curves over one quantity: curve name -> a value for each of ``x``."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    curves: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Findings:
    """Findings of one section."""

    lines: list[Line] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)

    def __add__(self, other: Findings) -> Findings:
        return Findings(self.lines + other.lines, self.charts + other.charts)

    def to_json(self) -> dict[str, Any]:
        return {"lines": [asdict(line) for line in self.lines], "charts": [asdict(chart) for chart in self.charts]}


def markdown(lines: Sequence[Line]) -> str:
    """Return the table in Markdown, for the screen and the README."""
    rows = [
        [
            line.section,
            line.what,
            f"{line.value:.3g} {line.unit}".strip(),
            "" if line.target is None else f"{line.target:g}",
        ]
        for line in lines
    ]
    return table_of_texts(["section", "what", "measured", "target"], rows)
