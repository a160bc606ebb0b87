"""Tables, and GitHub's Markdown for texts that may hold anything, names above all: they read as they are once rendered.

A line break in a text becomes a space.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

# Underscores within a word, as in intermediate_size, are no markup, nor are asterisks between spaces.
_MARKUP = re.compile(r"[\\`\[<&~#]|(?<! )\*|\*(?! )|(?<!\w)_+|_+(?!\w)")


def escaped(text: str) -> str:
    """A text within a line, in which nothing is markup."""
    return _MARKUP.sub(lambda found: "".join(f"\\{mark}" for mark in found[0]), on_one_line(text))


def code(text: str) -> str:
    """A code span, or plain text if that has a backtick."""
    line = on_one_line(text)
    return escaped(line) if "`" in line else f"`{line}`"


@dataclass(frozen=True)
class Column(Generic[T]):
    """One column of a table: its header, the text that it shows for a row, and whether that ``is_text`` such as a name,
    which is left-aligned and may wrap, rather than a number.
    """

    header: str
    show: Callable[[T], str]
    is_text: bool = False


def cells(rows: Sequence[T], columns: Sequence[Column[T]]) -> list[list[str]]:
    """Text of each column for each row, on one line."""
    return [[on_one_line(column.show(row)) for column in columns] for row in rows]


def markdown(rows: Sequence[T], columns: Sequence[Column[T]]) -> str:
    body = [[*map(escaped, line)] for line in cells(rows, columns)]
    sides = ["---" if column.is_text else "---:" for column in columns]
    return table([escaped(column.header) for column in columns], body, sides) + "\n"


def table(head: Sequence[str], body: Sequence[Sequence[str]], sides: Sequence[str] | None = None) -> str:
    """A table from cells in Markdown, without a trailing newline; ``sides`` are ``---`` for each left-aligned column,
    ``---:`` for each right-aligned one, or None if all are left-aligned.
    """
    first, *others = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in (head, *body)]
    return "\n".join([first, f"|{'|'.join(sides or ['---'] * len(head))}|", *others])


def on_one_line(text: str) -> str:
    """A text with single spaces in place of line breaks and of several spaces."""
    return " ".join(text.split())
