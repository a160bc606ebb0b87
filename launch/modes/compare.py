"""Implementation of launch/compare.py: rows and scores of several sweeps -> comparison.md and comparison.json."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from hfprune_launch.screen import ROOMY, SAID_OF_WIDE, TIGHT, make_console, say, show_table, table_of
from hfprune_launch.sweep_folder import CONFIG_FILE, RecordedSweep, read_sweep, require_folder
from rich.console import Console

from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.planning.plan import Cell
from hfprune_dist.results.agreement import (
    columns_of_pairs,
    compare_criteria,
    scores_to_compare,
)
from hfprune_dist.results.comparison import (
    MadeWith,
    columns_of_methods,
    compare_methods,
    difference,
    have_one_seed,
    made_with,
    methods_table,
    note_on_methods,
)
from hfprune_dist.results.markdown import Column, escaped, markdown
from hfprune_dist.results.rows import Row
from hfprune_dist.results.table import missing, not_comparable
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import write_json, write_text
from hfprune_dist.store.stage import Stage
from hfprune_dist.store.stage_handle import StageHandle

# Shares of a layer's units at which kept sets are compared: about what stays at ratios of 10 to 30 % of a model.
SHARES_KEPT = (0.8, 0.65, 0.5)
REFERENCE = "hfprune"  # unless another method is named
# Of each model, or pass over it: one record per pair of criteria.
Records = dict[str, list[dict[str, Any]]]
T = TypeVar("T")


@dataclass(frozen=True)
class Page(Generic[T]):
    """A table that follows the one of methods."""

    title: str
    rows: Sequence[T]
    columns: Sequence[Column[T]]

    def text(self) -> str:
        """Return the page in Markdown."""
        return f"# {escaped(self.title)}\n\n{markdown(self.rows, self.columns)}"

    def show(self, console: Console, wide: bool) -> None:
        say(console, f"\n{self.title}")
        show_table(console, [table_of(self.rows, self.columns, gap) for gap in (ROOMY, TIGHT)], wide)


def compare(folders: Sequence[Path], out: Path, named: str | None, wide: bool) -> None:
    """Compare the finished cells of several sweeps, with the method ``named`` as the reference.

    Args:
        wide: show all columns of the table of methods.

    Raises:
        UserError: if sweeps can't be compared, none has a finished cell, or none has the method ``named``.
    """
    sweeps = _read(folders)
    require_folder(out)
    reference = REFERENCE if named is None else named
    methods = compare_methods([sweep.rows for sweep in sweeps], reference)
    if not methods:
        raise UserError(f"{', '.join(map(str, folders))}: no cell is finished; run the sweeps first")
    if named is not None:
        _require_method(named, methods)
    criteria, unread = _criteria(sweeps[0])
    pages, warnings = _pages(criteria), [*_warnings(sweeps), *unread]
    record = {
        "methods": methods,
        "criteria": criteria,
        "sweeps": [str(it) for it in folders],
    }
    table = "\n".join([methods_table(methods, reference), *(f"{escaped(it)}\n" for it in warnings)])
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "comparison.json", record, sort_keys=False)
    write_text(out / "comparison.md", "\n".join([f"# Methods\n\n{table}", *(it.text() for it in pages)]))
    console = make_console()
    show_methods(console, methods, reference, wide)
    for text in warnings:
        say(console, text)
    for page in pages:
        page.show(console, wide)
    say(console, f"written: {out / 'comparison.md'}, comparison.json")


def _read(folders: Sequence[Path]) -> list[RecordedSweep]:
    """Read sweeps that can be compared: each given once, with the same models, files and settings behind rows that they
    have in common, but for the seed.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: one folder is given twice; give each sweep once")
    sweeps = [read_sweep(folder) for folder in folders]
    _refuse_other_settings(sweeps)
    return sweeps


def _require_method(named: str, methods: Sequence[Row]) -> None:
    names = sorted({row["method"] for row in methods})
    if named not in names:
        raise UserError(f"--reference: no method {named!r}{did_you_mean(named, names)}; valid: {', '.join(names)}")


def _pages(criteria: Records) -> list[Page[Any]]:
    """Return the pages that follow the table of methods."""
    return [Page(f"Criteria: {model}", pairs, columns_of_pairs(pairs)) for model, pairs in criteria.items() if pairs]


def show_methods(console: Console, methods: Sequence[Row], reference: str, wide: bool) -> None:
    """Show the table of methods, and notes on its meaning.

    Args:
        wide: show all columns, however wide it gets, instead of a few that fit the terminal.
    """
    columns = columns_of_methods(methods, reference, wide)
    told = note_on_methods(methods, reference, wide)
    show_table(console, [table_of(methods, columns, gap) for gap in (ROOMY, TIGHT)], wide)
    for note in [told, *([] if wide else [SAID_OF_WIDE])]:
        console.print(note, markup=False, highlight=False)


def _refuse_other_settings(sweeps: Sequence[RecordedSweep]) -> None:
    """Refuse sweeps whose finished rows differ in more than the seed, since their mean would be one of seeds; and rows
    that don't even differ in the seed, although their stages do.
    """
    known: dict[tuple[object, ...], list[tuple[Path, MadeWith]]] = {}
    for sweep in sweeps:
        done = (cell for cell, row in zip(sweep.plan.cells, sweep.rows, strict=True) if row["status"] == "done")
        for cell in done:
            made = made_with(sweep.plan, cell)
            seeds = known.setdefault((cell.model, cell.ratio, cell.method, cell.recovery), [])
            for first, other in seeds:
                if (found := difference(other, made)) is not None:
                    raise _not_a_seed(sweep.folder, cell, first, *found)
                if have_one_seed(made, other):
                    raise UserError(
                        f"{sweep.folder}: its row {cell.label!r} is the same as in {first}, seed and settings too; "
                        "compare sweeps that differ in their seed (--set seed=1)"
                    )
            seeds.append((sweep.folder, made))


def _not_a_seed(folder: Path, cell: Cell, first: Path, stage: str, name: str, one: str, other: str) -> UserError:
    return UserError(
        f"{folder}: its row {cell.label!r} differs from that of {first} in more than the seed: {name} (stage {stage}) "
        f"is {one} in {first}, {other} in {folder}; compare sweeps that differ in their seed alone, as run with "
        f"--config {first / CONFIG_FILE} --set seed=1 --out NEW, or remove the row from one: sweep.py --out {folder} "
        f"--forget {shlex.quote(cell.label)}"
    )


def _warnings(sweeps: Sequence[RecordedSweep]) -> list[str]:
    """Name the rows without a result, which the table leaves out, and why; and the finished ones whose scores can't be
    compared with their model's first one, as of other held-out text.
    """
    rows = [{**row, "label": f"{sweep.folder}: {row['label']}"} for sweep in sweeps for row in sweep.rows]
    return [*missing(rows), *not_comparable([row for row in rows if row["status"] == "done"])]


def _calibrations(sweep: RecordedSweep) -> list[Stage]:
    """Return the calibration passes of a sweep's dense models, labelled with the models' names."""
    stages = [stage for stage in sweep.plan.stages.values() if stage.kind == "importance"]
    return [stage for stage in stages if not stage.needs]


def _criteria(sweep: RecordedSweep) -> tuple[Records, list[str]]:
    """Model, or pass over it -> agreement of its criteria, from the first sweep's scores of the dense model; and a note
    on each pass whose scores can't be read. Rows stand without them.
    """
    records: Records = {}
    unread: list[str] = []
    for label, scored in _scored(sweep):
        try:
            records[label] = compare_criteria(scores_to_compare(scored.artifact), SHARES_KEPT)
        except UserError as error:
            unread.append(f"criteria can't be compared on {label}: {error}")
    return records, unread


def _scored(sweep: RecordedSweep) -> list[tuple[str, StageHandle]]:
    """Return (model, stage) for every calibration pass of a dense model that has been made.

    If rows of earlier runs have passes of their own, as with other calibration text, the ids of a model's passes are
    part of their names.
    """
    store = Store(sweep.folder / "store")
    made = [(stage.label, store.handle(stage.id)) for stage in _calibrations(sweep)]
    made = [(label, handle) for label, handle in made if handle.is_committed()]
    passes = Counter(label for label, _ in made)
    return [(label if passes[label] == 1 else f"{label}, {handle.id}", handle) for label, handle in made]
