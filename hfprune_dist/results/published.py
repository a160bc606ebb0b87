"""Results that papers report for their methods, to be read next to a sweep's own rows."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from hfprune_dist.config.yaml_text import read_yaml
from hfprune_dist.results.markdown import Column


@dataclass(frozen=True)
class PublishedTable:
    """Numbers from a paper, as printed in it, that were all measured in the same way, described in ``protocol``.

    Attributes:
        columns, tasks: names of the figures in a row's ``scores`` and ``of_tasks``.
        rows: ``method``; ``ratio`` as the paper defines it, and that as a share of all parameters, ``removed``;
            ``recovery``: "own" if pruning and training are one. What a paper doesn't say is left out or null.
    """

    title: str
    protocol: str
    columns: list[str]
    rows: list[dict[str, Any]]
    tasks: list[str] = field(default_factory=list)

    def shown(self, wide: bool) -> list[Column[dict[str, Any]]]:
        """The table's columns; ``wide``: with the score of each task."""
        names = {"published": "method", "ratio": "ratio", "of all": "removed"}
        if any("recovery" in row for row in self.rows):
            names["recovery"] = "recovery"
        columns = [Column(header, partial(_fact, key), is_text=True) for header, key in names.items()]
        figures = [("of_tasks", self.tasks if wide else []), ("scores", self.columns)]
        return columns + [Column(it, partial(_figure, key, n)) for key, own in figures for n, it in enumerate(own)]


def _fact(key: str, row: dict[str, Any]) -> str:
    unstated = {"ratio": "dense", "removed": "-", "recovery": "none"}
    return str(unstated[key] if row.get(key) is None else row[key])


def _figure(key: str, place: int, row: dict[str, Any]) -> str:
    figures = row.get(key)
    return "-" if not figures or figures[place] is None else str(figures[place])


def read_published(file: Path) -> list[PublishedTable]:
    """The tables of ``configs/published.yaml``.

    Raises:
        UserError: if it can't be read as YAML.
    """
    return [PublishedTable(**table) for table in read_yaml(file, "published", "tables")["tables"]]
