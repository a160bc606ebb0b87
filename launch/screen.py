"""Screen output of the commands: the plan, progress while stages run, and the table of results."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console, JustifyMethod
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Column as RichColumn
from rich.table import Table

from hfprune_dist.planning.plan import Plan
from hfprune_dist.results.checkpoints import Update
from hfprune_dist.results.formats import counted, duration
from hfprune_dist.results.markdown import Column, cells
from hfprune_dist.results.rows import FAILED, MISSING, Row
from hfprune_dist.results.table import causes, columns, notes
from hfprune_dist.store.artifacts import Verdict
from hfprune_dist.store.heartbeat import Failure, Heartbeat
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


def plain_table(*headers: str) -> Table:
    """Return a table in which text breaks over lines where it doesn't fit, rather than being cut off."""
    return Table(*(RichColumn(header, overflow="fold") for header in headers), box=None, pad_edge=False)


def show_plan(console: Console, plan: Plan, verdicts: Mapping[str, Verdict], todo: Sequence[str]) -> None:
    """Show one line per stage: reuse, run or not needed, and the reason."""
    actions = {stage_id: "reuse" if verdict.state == "done" else "not needed" for stage_id, verdict in verdicts.items()}
    actions |= dict.fromkeys(todo, "run")
    lines = plain_table("stage", "for", "id", "action", "reason")
    for stage in plan.stages.values():
        reason = escape(verdicts[stage.id].reason)
        lines.add_row(stage.kind, escape(stage.label), stage.fingerprint, actions[stage.id], reason)
    console.print(lines)
    counts = Counter(actions.values())
    unneeded = f", {counts['not needed']} not needed" if counts["not needed"] else ""
    size = f"{counted(len(plan.cells), 'cell')}, {counted(len(plan.stages), 'stage')}"
    console.print(f"{size}: {counts['reuse']} reuse, {counts['run']} run{unneeded}")


def show_shapes(console: Console, shapes: Mapping[str, Mapping[str, str]]) -> None:
    """Show the sizes of each cell's checkpoint; "-" stands for sizes that only a stage can determine."""
    names = ["width", "KV heads", "layers", "ratio"]
    if any("experts" in sizes for sizes in shapes.values()):
        names.insert(0, "experts")
    lines = plain_table("checkpoint of", *names, "")
    for column in lines.columns[1:-1]:
        column.justify = "right"
    for label, sizes in shapes.items():
        lines.add_row(escape(label), *(sizes.get(name, "-") for name in names), sizes.get("note", ""))
    console.print(lines)


def time_left(heartbeat: Heartbeat | None) -> str:
    """Return the time until the end of the current phase; empty if it isn't known yet."""
    seconds = None if heartbeat is None else heartbeat.seconds_left
    return "" if seconds is None else duration(seconds)


class ProgressLines:
    """Where there is no terminal to show more, as under nohup or in a pipe: an occasional line for each running stage.

    Args:
        clock: seconds of a monotonic clock.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._told_at: dict[str, float] = {}

    def tell(self, stage: Stage, progress: str, left: str) -> None:
        """Print how far a stage is, if a line is due; to be called on every sign of progress of a running stage.

        Args:
            progress: e.g. "calibration 3/9"; empty while the stage starts.
            left: the time left; empty if it isn't known.
        """
        now = self._clock()
        if self._console.is_terminal or now - self._told_at.setdefault(stage.id, now) < LINE_INTERVAL_S:
            return
        self._told_at[stage.id] = now
        remaining = f", {left} left" if left else ""
        say(self._console, f"{stage.kind} {stage.label}: {progress or 'starting'}{remaining}")


class StageScreen:
    """Progress of a sweep: a live bar on a terminal, occasional lines elsewhere, and always one per finished stage."""

    def __init__(self, console: Console, progress: Progress, total: int) -> None:
        self._console = console
        self._progress = progress
        self._total = total
        self._lines = ProgressLines(console)
        self._finished = 0
        self._bar: TaskID | None = None
        self._began = time.monotonic()

    def expect(self, more: int) -> None:
        """Count further stages, which turned out to be missing."""
        self._total += more

    def begin(self, stage: Stage) -> None:
        name = f"{stage.kind} {escape(stage.label)}"
        self._began = time.monotonic()
        self._bar = self._progress.add_task(name, total=None, phase="starting", left="")

    def beat(self, stage: Stage, heartbeat: Heartbeat | None) -> None:
        """Show the latest heartbeat of a running stage."""
        left = time_left(heartbeat)
        self._lines.tell(stage, "" if heartbeat is None else str(heartbeat), left)
        if heartbeat is not None and self._bar is not None:
            phase, remaining = escape(heartbeat.phase), f"{left} left" if left else ""
            self._progress.update(
                self._bar, completed=heartbeat.done, total=heartbeat.total, phase=phase, left=remaining
            )

    def end(self, stage: Stage, failure: Failure | None) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None
        mark = "[green]done[/]" if failure is None else "[red]failed[/]"
        self._line(f"{mark} {stage.kind} {escape(stage.label)} ({time.monotonic() - self._began:.1f} s)")
        if failure is not None:
            self._console.print(f"  {escape(failure.message)}", highlight=False, soft_wrap=True)

    def skip(self, stage: Stage, waiting_for: Stage) -> None:
        self._line(
            f"[yellow]skipped[/] {stage.kind} {escape(stage.label)}: {waiting_for.kind} {escape(waiting_for.label)} "
            "is missing"
        )

    def _line(self, text: str) -> None:
        self._finished += 1
        self._console.print(f"[{self._finished}/{self._total}] {text}", highlight=False)


@contextmanager
def stage_screen(console: Console, total: int) -> Iterator[StageScreen]:
    """Show progress for as long as stages run."""
    parts = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[phase]}"),
        TextColumn("{task.fields[left]}"),
        TimeElapsedColumn(),
    )
    with Progress(*parts, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield StageScreen(console, progress, total)


def show_results(console: Console, rows: Sequence[Row], wide: bool = False) -> None:
    """Show the table of results, notes on its meaning, and the reasons why rows have no result.

    Args:
        wide: show all columns, however wide it gets, instead of a few that fit the terminal.
    """
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
        side: JustifyMethod = "left" if column.is_text else "right"
        lines.add_column(escape(column.header), justify=side, no_wrap=not column.is_text, overflow="fold")
    for texts in cells(rows, shown):
        lines.add_row(*map(escape, texts))
    return lines


def show_table(console: Console, table: Table, wide: bool = False) -> None:
    """Show a table within the terminal's width, or within 80 characters where there is none.

    Args:
        wide: show it as wide as it is, and let the terminal break its lines.
    """
    if wide:
        table.width = _whole_width(console, table)
    console.print(table, soft_wrap=wide, width=None if wide else _width(console))


def show_checkpoints(console: Console, update: Update) -> None:
    """Show where the rows' checkpoints are, and remarks on their folders."""
    lines = ["checkpoints:", *(f"  {folder}" for folder in update.folders.values())] if update.folders else []
    for line in (*lines, *(f"note: {remark}" for remark in update.remarks)):
        say(console, line)
