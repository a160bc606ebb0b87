"""Columns, and the tables made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from hfprune_dist.results.markdown import on_one_line, table_of_texts

T = TypeVar("T")


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column of a table: its header, and the text that it shows for a row.

    Attributes:
        is_text: whether the column holds names, which are left-aligned and may wrap, rather than numbers.
    """

    header: str
    show: Callable[[T], str]
    is_text: bool = False


def cells(rows: Sequence[T], columns: Sequence[Column[T]]) -> list[list[str]]:
    """Text of each column for each row, on one line."""
    return [[on_one_line(column.show(row)) for column in columns] for row in rows]


def markdown(rows: Sequence[T], columns: Sequence[Column[T]]) -> str:
    """A table in Markdown."""
    sides = ["---" if column.is_text else "---:" for column in columns]
    return table_of_texts([column.header for column in columns], cells(rows, columns), sides) + "\n"
