"""Results that papers report for their methods, to be read next to a sweep's own rows."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from hfprune_dist.config.section import Section
from hfprune_dist.config.yaml_text import read_yaml
from hfprune_dist.results.formats import number
from hfprune_dist.results.markdown import Column

# As printed in the paper, with the same number of digits.
Figure = int | float


class PublishedRow(Section):
    """One model of a paper.

    Attributes:
        ratio: as the paper defines it; None: the dense model.
        removed: that ratio as a share of all parameters, None if the paper doesn't give enough information.
        recovery: its training; "own" if pruning and training are one.
        scores, of_tasks: in the order of the table's ``columns`` and ``tasks``; None: not reported.
    """

    method: str
    ratio: Annotated[float, Field(gt=0, lt=1)] | None = None
    removed: Annotated[float, Field(gt=0, lt=1)] | None = None
    recovery: Literal["none", "lora", "own"] = "none"
    scores: list[Figure | None]
    of_tasks: list[Figure] = Field(default=[])


class PublishedTable(Section):
    """Numbers from a paper that were all measured in the same way, described in ``protocol``."""

    title: str
    protocol: str
    columns: list[str]
    tasks: list[str] = Field(default=[])
    rows: list[PublishedRow]

    @model_validator(mode="after")
    def _rows_have_the_columns(self) -> PublishedTable:
        for row in self.rows:
            if len(row.scores) != len(self.columns) or len(row.of_tasks) not in (0, len(self.tasks)):
                raise ValueError(f"{row.method} of {self.title!r} has more or fewer scores than the table has columns")
        return self

    def shown(self, wide: bool) -> list[Column[PublishedRow]]:
        """The table's columns; ``wide``: with the score of each task."""
        columns: list[Column[PublishedRow]] = [
            Column("published", lambda row: row.method, is_text=True),
            Column("ratio", lambda row: "dense" if row.ratio is None else f"{row.ratio:g}", is_text=True),
            Column("of all", lambda row: number(row.removed, "g"), is_text=True),
        ]
        if any(row.recovery != "none" for row in self.rows):
            columns.append(Column("recovery", lambda row: row.recovery, is_text=True))
        tasks = self.tasks if wide else []
        columns += [Column(task, partial(_printed, "of_tasks", place)) for place, task in enumerate(tasks)]
        return columns + [Column(name, partial(_printed, "scores", place)) for place, name in enumerate(self.columns)]


def _printed(which: str, place: int, row: PublishedRow) -> str:
    figures = getattr(row, which)
    return "-" if not figures or figures[place] is None else str(figures[place])


class Published(Section):
    """Content of ``configs/published.yaml``."""

    tables: list[PublishedTable]


def read_published(file: Path) -> list[PublishedTable]:
    """The tables of a file such as ``configs/published.yaml``.

    Raises:
        UserError: if it can't be read as YAML.
        ValidationError: if its content has another form.
    """
    return Published.model_validate(read_yaml(file, "published", "tables")).tables
