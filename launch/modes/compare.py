"""Implementation of launch/compare.py: rows and scores of several sweeps -> comparison.md and comparison.json."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hfprune_launch.screen import ROOMY, SAID_OF_WIDE, TIGHT, make_console, say, show_table, table_of
from hfprune_launch.sweep_folder import RecordedSweep, read_sweep, require_folder
from rich.console import Console

from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.results.agreement import columns_of_pairs, compare_criteria, read_scores
from hfprune_dist.results.comparison import (
    MadeWith,
    columns_of_methods,
    compare_methods,
    difference,
    made_with,
    methods_table,
    note_on_methods,
)
from hfprune_dist.results.markdown import escaped, markdown
from hfprune_dist.results.rows import Row
from hfprune_dist.results.table import not_comparable
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import write_json, write_text

# Shares of a layer's units at which kept sets are compared: about what stays at ratios of 10 to 30 % of a model.
SHARES_KEPT = (0.8, 0.65, 0.5)
REFERENCE = "hfprune"  # unless another method is named
# Of each model, or pass over it: one record per pair of criteria.
Records = dict[str, list[dict[str, Any]]]


def compare(folders: Sequence[Path], out: Path, named: str | None, wide: bool) -> None:
    """Compare the finished cells of several sweeps, with the method ``named`` as the reference.

    Args:
        wide: show all columns of the table of methods.

    Raises:
        UserError: if sweeps can't be compared, none has a finished cell, or none has the method ``named``.
    """
    if len({folder.resolve() for folder in folders}) < len(folders):
        raise UserError(f"{', '.join(map(str, folders))}: one folder is given twice; give each sweep once")
    sweeps = [read_sweep(folder) for folder in folders]
    _refuse_other_settings(sweeps)
    require_folder(out)
    reference = REFERENCE if named is None else named
    methods = compare_methods([sweep.rows for sweep in sweeps], reference)
    if not methods:
        raise UserError(f"{', '.join(map(str, folders))}: no cell is finished; run the sweeps first")
    names = sorted({row["method"] for row in methods})
    if named is not None and named not in names:
        raise UserError(f"--reference: no method {named!r}{did_you_mean(named, names)}; valid: {', '.join(names)}")
    criteria, unread = _criteria(sweeps[0])
    warnings = [*_warnings(sweeps), *unread]
    parts = [f"# Methods\n\n{methods_table(methods, reference)}", *(f"{escaped(it)}\n" for it in warnings)]
    pages = {f"Criteria: {model}": pairs for model, pairs in criteria.items() if pairs}
    parts += [f"# {escaped(title)}\n\n{markdown(it, columns_of_pairs(it))}" for title, it in pages.items()]
    out.mkdir(parents=True, exist_ok=True)
    record = {"methods": methods, "criteria": criteria, "sweeps": [str(it) for it in folders]}
    write_json(out / "comparison.json", record, sort_keys=False)
    write_text(out / "comparison.md", "\n".join(parts))
    console = make_console()
    show_methods(console, methods, reference, wide)
    for text in warnings:
        say(console, text)
    for title, pairs in pages.items():
        say(console, f"\n{title}")
        show_table(console, [table_of(pairs, columns_of_pairs(pairs), gap) for gap in (ROOMY, TIGHT)], wide)
    say(console, f"written: {out / 'comparison.md'}, comparison.json")


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
    known: dict[tuple[object, ...], list[tuple[Path, str, MadeWith]]] = {}
    for sweep in sweeps:
        done = (cell for cell, row in zip(sweep.plan.cells, sweep.rows, strict=True) if row["status"] == "done")
        for cell in done:
            made = made_with(sweep.plan, cell)
            seeds = known.setdefault((cell.model, cell.ratio, cell.method, cell.recovery), [])
            for first, evaluation, other in seeds:
                if found := difference(other, made):
                    raise UserError(
                        f"{sweep.folder}: its row {cell.label!r} differs from that of {first} in more than the seed: "
                        f"{found}; run both with one configuration, or remove the row from one: sweep.py --out "
                        f"{sweep.folder} --forget {shlex.quote(cell.label)}"
                    )
                if cell.producers and evaluation == cell.evaluate:
                    raise UserError(
                        f"{sweep.folder}: its row {cell.label!r} is the same as in {first}, seed and settings too; "
                        "compare sweeps that differ in their seed (--set seed=1)"
                    )
            seeds.append((sweep.folder, cell.evaluate, made))


def _warnings(sweeps: Sequence[RecordedSweep]) -> list[str]:
    """Name the rows without a result, which the table leaves out, and why; and the finished ones whose scores can't be
    compared with their model's first one, as of other held-out text.
    """
    rows = [{**row, "label": f"{sweep.folder}: {row['label']}"} for sweep in sweeps for row in sweep.rows]
    lost = [f"missing: {row['label']}: {row['cause']}" for row in rows if row["status"] == "missing"]
    return [*lost, *not_comparable([row for row in rows if row["status"] == "done"])]


def _criteria(sweep: RecordedSweep) -> tuple[Records, list[str]]:
    """Model -> agreement of its criteria, from the first sweep's scores of the dense model; and a note on each pass
    whose scores can't be read. Rows stand without them.
    """
    records: Records = {}
    unread: list[str] = []
    store = Store(sweep.folder / "store")
    passes = [it for it in sweep.plan.stages.values() if it.kind == "importance" and not it.needs]
    for stage in passes:
        handle = store.handle(stage.id)
        label = stage.label if [it.label for it in passes].count(stage.label) == 1 else f"{stage.label}, {stage.id}"
        if handle.is_committed():
            try:
                records[label] = compare_criteria(read_scores(handle.artifact), SHARES_KEPT)
            except UserError as error:
                unread.append(f"criteria can't be compared on {label}: {error}")
    return records, unread
