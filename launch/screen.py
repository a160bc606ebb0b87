"""Screen output of the commands: progress while stages run, and the table of results."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from typing import TypeVar

from rich.console import Console
from rich.live import Live
from rich.markup import escape
from rich.table import Column as RichColumn
from rich.table import Table
from rich.text import Text

from hfprune_dist.results.checkpoints import Update
from hfprune_dist.results.formats import duration
from hfprune_dist.results.markdown import Column, cells
from hfprune_dist.results.rows import FAILED, MISSING, Row
from hfprune_dist.results.table import causes, columns, notes
from hfprune_dist.store.heartbeat import Heartbeat
from hfprune_dist.store.stage import Stage

PIPED = 80  # characters of a table where there is no terminal
SPARE = ("size", "time", "speed")  # columns that are left out, one after the other, where names would break over lines
# Seconds between two lines about one stage, and before the first.
LINE_INTERVAL_S = 30.0
ALL_COLUMNS = "all columns: results.md, or report.py --wide"
T = TypeVar("T")


class _PipedConsole(Console):
    """A console for output whose reader, such as head, may go, which ends a command; rich would exit with 1."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def make_console() -> Console:
    """Return a console as wide as the terminal; a pipe or file has no width."""
    # Rich would show the ``:100:`` of ``train.py:100: error`` as a picture.
    return _PipedConsole(width=None if sys.stdout.isatty() else 400, emoji=False)


def say(console: Console, text: str) -> None:
    """Print text as it is, without markup or added line breaks, so that paths can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def plain_table(*headers: str, numbers: Collection[str] = ()) -> Table:
    """Return a table whose text breaks over lines; ``numbers`` are headers of right-aligned columns."""
    columns = (RichColumn(name, overflow="fold", justify="right" if name in numbers else "left") for name in headers)
    return Table(*columns, box=None, pad_edge=False)


def time_left(heartbeat: Heartbeat | None) -> str:
    """Return the time until the end of the current phase; empty if it isn't known yet."""
    seconds = None if heartbeat is None else heartbeat.seconds_left
    return "" if seconds is None else duration(seconds)


class ProgressLines:
    """Where there is no terminal to show more, as under nohup: an occasional line for each running stage."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._told_at: dict[str, float] = {}

    def tell(self, stage: Stage, progress: str, left: str) -> str:
        """Print how far a stage is, if a line is due, and return the line; to be called again and again. ``progress``
        is empty while a stage starts and while it ends, ``left`` where the time left isn't known.
        """
        line = f"{stage.kind} {stage.label}: {progress or 'at work'}{left and f', {left} left'}"
        now = time.monotonic()
        if not self._console.is_terminal and now - self._told_at.setdefault(stage.id, now) >= LINE_INTERVAL_S:
            self._told_at[stage.id] = now
            say(self._console, line)
        return line


class StageScreen:
    """The stages of a sweep on this machine: a line for each that has ended, and below them the one at work."""

    def __init__(self, console: Console, total: int) -> None:
        self.live = Live(console=console, transient=True, auto_refresh=False)
        self.total = total
        self._console = console
        self._lines = ProgressLines(console)
        self._ended = 0

    def beat(self, stage: Stage, heartbeat: Heartbeat | None) -> None:
        """Show the latest heartbeat of a running stage."""
        line = self._lines.tell(stage, str(heartbeat or ""), time_left(heartbeat))
        if self._console.is_terminal:
            self.live.update(Text(line), refresh=True)

    def end(self, stage: Stage, outcome: str, told: str) -> None:
        """Tell that a stage is done, failed or skipped."""
        self._ended += 1
        color = {"done": "green", "failed": "red"}.get(outcome, "yellow")
        line = f"[{self._ended}/{self.total}] [{color}]{outcome}[/] {stage.kind} {escape(f'{stage.label}{told}')}"
        self.live.update("", refresh=True)
        self._console.print(line, highlight=False, soft_wrap=True)


def show_results(console: Console, rows: Sequence[Row], wide: bool = False) -> None:
    """Show the table of results, notes, and why rows have no result; a ``wide`` one has all columns."""
    shown = columns(rows, wide)
    for spare in () if wide else SPARE:
        if _whole_width(console, table_of(rows, shown)) > _width(console):
            shown = [column for column in shown if column.header != spare]
    table = table_of(rows, shown)
    for line, row in zip(table.rows, rows, strict=True):
        line.style = {FAILED: "red", MISSING: "bright_black"}.get(row["status"])
    show_table(console, table, wide)
    for note in notes(rows, wide=True) if wide else [f"{notes(rows)[0]}; {ALL_COLUMNS}"]:
        console.print(note, highlight=False, markup=False, width=_width(console))
    for cause in causes(rows):
        say(console, cause)


def _width(console: Console) -> int:
    return console.width if console.is_terminal else PIPED


def _whole_width(console: Console, table: Table) -> int:
    return console.measure(table, options=console.options.update(max_width=10**6)).maximum


def table_of(rows: Sequence[T], shown: Sequence[Column[T]]) -> Table:
    """Return a table whose names break over lines where they don't fit."""
    lines = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for column in shown:
        header, is_number = escape(column.header), not column.is_text
        lines.add_column(header, justify="right" if is_number else "left", no_wrap=is_number, overflow="fold")
    for texts in cells(rows, shown):
        lines.add_row(*map(escape, texts))
    return lines


def show_table(console: Console, table: Table, wide: bool = False) -> None:
    """Show a table within the terminal's width, or within 80 characters without one, or as ``wide`` as it is."""
    if wide:
        table.width = _whole_width(console, table)
    console.print(table, soft_wrap=wide, width=None if wide else _width(console))


def show_checkpoints(console: Console, update: Update) -> None:
    """Show where the rows' checkpoints are, and remarks on their folders."""
    lines = ["checkpoints:", *(f"  {folder}" for folder in update.folders.values())] if update.folders else []
    for line in (*lines, *(f"note: {remark}" for remark in update.remarks)):
        say(console, line)
