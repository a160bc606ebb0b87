"""Columns, and the tables made from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

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
    return [[" ".join(column.show(row).split()) for column in columns] for row in rows]


def markdown(rows: Sequence[T], columns: Sequence[Column[T]]) -> str:
    """A table in GitHub's markdown."""
    sides = ["---" if column.is_text else "---:" for column in columns]
    return markdown_of([column.header for column in columns], cells(rows, columns), sides) + "\n"


def markdown_of(head: Sequence[str], body: Sequence[Sequence[str]], sides: Sequence[str] | None = None) -> str:
    """A table in GitHub's markdown from the text of its cells, without a trailing newline.

    Args:
        sides: ``---`` for each left-aligned column, ``---:`` for each right-aligned one; None: all left-aligned.
    """
    first, *others = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, *body)]
    return "\n".join([first, f"|{'|'.join(sides or ['---'] * len(head))}|", *others])
