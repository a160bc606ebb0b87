"""What the commands show: the plan, progress while stages run, and the table of results."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import yaml
from hfprune_launch.stage.outcome import Outcome
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from hfprune_dist.planning.plan import Plan
from hfprune_dist.results.table import Row, table
from hfprune_dist.store.artifacts import Verdict
from hfprune_dist.store.heartbeat import Heartbeat
from hfprune_dist.store.stage import Stage


def make_console() -> Console:
    """A console as wide as the terminal; a pipe or file has no width, so tables there are as wide as they are."""
    return Console() if sys.stdout.isatty() else Console(width=400)


def show_plan(console: Console, plan: Plan, verdicts: Mapping[str, Verdict], todo: Sequence[str]) -> None:
    """One line per stage: reuse, run or not needed, and the reason."""
    actions = {stage_id: "reuse" if verdict.state == "done" else "not needed" for stage_id, verdict in verdicts.items()}
    actions |= dict.fromkeys(todo, "run")
    lines = Table("stage", "for", "id", "action", "reason", box=None, pad_edge=False)
    for stage in plan.stages.values():
        reason = escape(verdicts[stage.id].reason)
        lines.add_row(stage.kind, escape(stage.label), stage.fingerprint, actions[stage.id], reason)
    console.print(lines)
    counts = Counter(actions.values())
    unneeded = f", {counts['not needed']} not needed" if counts["not needed"] else ""
    console.print(
        f"{len(plan.cells)} cells, {len(plan.stages)} stages: {counts['reuse']} reuse, {counts['run']} run{unneeded}"
    )


class StageScreen:
    """Progress of a sweep: a live bar on a terminal, one line per finished stage anywhere."""

    def __init__(self, console: Console, progress: Progress, total: int) -> None:
        self._console = console
        self._progress = progress
        self._total = total
        self._finished = 0
        self._bar: TaskID | None = None

    def begin(self, stage: Stage) -> None:
        self._bar = self._progress.add_task(f"{stage.kind} {escape(stage.label)}", total=None, phase="starting")

    def beat(self, heartbeat: Heartbeat | None) -> None:
        if heartbeat is not None and self._bar is not None:
            self._progress.update(
                self._bar, completed=heartbeat.done, total=heartbeat.total, phase=escape(heartbeat.phase)
            )

    def end(self, stage: Stage, outcome: Outcome) -> None:
        self._close_bar()
        mark = "[green]done[/]" if outcome.state == "done" else "[red]failed[/]"
        self._line(f"{mark} {stage.kind} {escape(stage.label)} ({outcome.seconds:.1f} s)")
        if outcome.failure is not None:
            self._console.print(f"  {escape(outcome.failure.message)}", highlight=False, soft_wrap=True)

    def skip(self, stage: Stage, waiting_for: Stage) -> None:
        self._line(
            f"[yellow]skipped[/] {stage.kind} {escape(stage.label)}: {waiting_for.kind} {escape(waiting_for.label)} "
            "is missing"
        )

    def _line(self, text: str) -> None:
        self._finished += 1
        self._console.print(f"[{self._finished}/{self._total}] {text}", highlight=False)

    def _close_bar(self) -> None:
        if self._bar is not None:
            self._progress.remove_task(self._bar)
            self._bar = None


@contextmanager
def stage_screen(console: Console, total: int) -> Iterator[StageScreen]:
    """Show progress for as long as stages run."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[phase]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield StageScreen(console, progress, total)


def show_results(console: Console, rows: Sequence[Row]) -> None:
    """The table of results; cells without a result are listed below it with their cause."""
    headers, body = table(rows)
    lines = Table(*headers, box=None, pad_edge=False)
    for cells, row in zip(body, rows, strict=True):
        if row["status"] == "done":
            lines.add_row(*(escape(cell) for cell in cells))
        else:
            lines.add_row(*(escape(cell) for cell in cells[:-1]), "[red]missing[/]")
    console.print(lines)
    for row in rows:
        if row["status"] == "missing":
            console.print(f"missing: {row['label']}: {row['cause']}", highlight=False, markup=False, soft_wrap=True)


def show_published(console: Console, file: Path) -> None:
    """The rows of a paper, as ``configs/published.yaml`` has them."""
    source = yaml.safe_load(file.read_text(encoding="utf-8"))
    tasks = source["tasks"]
    lines = Table("published", "ratio", "recovery", *tasks, "avg", box=None, pad_edge=False)
    for row in source["rows"]:
        scores = [f"{score:.1f}" for score in row.get("scores", [])] or ["-"] * len(tasks)
        lines.add_row(row["method"], f"{row['ratio']:g}", row["recovery"], *scores, f"{row['average']:.1f}")
    console.print("\nLLaMA-2-7B, arXiv 2603.08083, 10-task average; crows_pairs_english: lower is better")
    console.print(lines)
