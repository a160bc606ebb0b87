"""Columns, and tables made of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column: its header, and what it shows of a row.

    Attributes:
        is_text: whether it is a name, which is aligned to the left and may be broken, and not a number.
    """

    header: str
    show: Callable[[T], str]
    is_text: bool = False


def cells(rows: Sequence[T], columns: Sequence[Column[T]]) -> list[list[str]]:
    """What each column shows of each row, on one line."""
    return [[" ".join(column.show(row).split()) for column in columns] for row in rows]


def markdown(rows: Sequence[T], columns: Sequence[Column[T]]) -> str:
    """A table in GitHub's markdown."""
    sides = ["---" if column.is_text else "---:" for column in columns]
    return markdown_of([column.header for column in columns], cells(rows, columns), sides) + "\n"


def markdown_of(head: Sequence[str], body: Sequence[Sequence[str]], sides: Sequence[str] | None = None) -> str:
    """The same of what cells show, without a line's end behind it.

    Args:
        sides: ``---`` of a column on the left, ``---:`` of one on the right; None: all are on the left.
    """
    first, *others = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, *body)]
    return "\n".join([first, f"|{'|'.join(sides or ['---'] * len(head))}|", *others])
