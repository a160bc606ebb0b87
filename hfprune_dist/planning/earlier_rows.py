"""Rows from earlier runs in a folder, added to those of today's plan."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from hfprune_dist.errors import UserError
from hfprune_dist.planning.plan import NONE, Cell, Plan, label_of
from hfprune_dist.store.stage import Input


def with_earlier_rows(today: Plan, earlier: Plan) -> Plan:
    """Today's plan with every earlier row that it doesn't replace.

    An earlier row is replaced by one of today with the same model, ratio, method and recovery, whatever its settings,
    or with the same evaluation. If earlier rows are added, rows are sorted by model, ratio, method and recovery.
    """
    kept = _not_replaced(today, earlier)
    if not kept:
        return today
    needed = {stage_id: earlier.stages[stage_id] for cell in kept for stage_id in earlier.upstream(cell)}
    stages = {**today.stages, **{stage_id: stage for stage_id, stage in needed.items() if stage_id not in today.stages}}
    cells = _relabelled([*today.cells, *kept])
    return replace(today, stages=stages, cells=tuple(_in_order(cells, [*earlier.cells, *today.cells])))


def refuse_other_checkpoints(today: Plan, earlier: Plan, out: Path) -> None:
    """Refuse a model if earlier rows of another checkpoint with its name would stay in the folder: what rows say of
    their dense model is known by its name alone, so they would be described as made from today's.

    Args:
        out: the folder, for the message.

    Raises:
        UserError: naming both checkpoints, and the rows that would stay.
    """
    now = {cell.model: _dense(today, cell) for cell in today.cells}
    for cell in _not_replaced(today, earlier):
        dense = _dense(earlier, cell)
        if cell.model in now and dense.identity != now[cell.model].identity:
            others = [it.label for it in _not_replaced(today, earlier) if it.model == cell.model]
            raise UserError(
                f"--out {out}: its rows {', '.join(map(repr, others))}, which stay, are of another "
                f"checkpoint ({dense.location}, as it was) than its model {cell.model!r} ({now[cell.model].location}); "
                "give the model another name through an alias, use another --out, or remove these rows first: "
                + " ".join(f"--forget {shlex.quote(label)}" for label in others)
            )


def _dense(plan: Plan, cell: Cell) -> Input:
    return plan.stages[cell.evaluate].inputs["dense"]


def _not_replaced(today: Plan, earlier: Plan) -> list[Cell]:
    """The earlier rows that ``with_earlier_rows`` adds."""
    places = {_place(cell) for cell in today.cells}
    return [cell for cell in kept_rows(today, earlier) if _place(cell) not in places]


def kept_rows(today: Plan, folder: Plan) -> list[Cell]:
    """The rows of a folder that are not in today's plan."""
    planned = {cell.evaluate for cell in today.cells}
    return [cell for cell in folder.cells if cell.evaluate not in planned]


def without_rows(plan: Plan, labels: Iterable[str]) -> Plan:
    """A plan without some of its rows and without the stages that nothing else needs."""
    dropped = set(labels)
    cells = tuple(cell for cell in plan.cells if cell.label not in dropped)
    needed = {stage_id for cell in cells for stage_id in plan.upstream(cell)} | {*plan.asked}
    return replace(plan, stages={key: stage for key, stage in plan.stages.items() if key in needed}, cells=cells)


def _place(cell: Cell) -> tuple[str | None, ...]:
    return cell.model, None if cell.ratio is None else f"{cell.ratio:g}", cell.method, cell.recovery


def _relabelled(cells: list[Cell]) -> list[Cell]:
    """Add each row's method to its label if there are several methods."""
    if len({cell.method for cell in cells} - {None}) < 2:
        return cells
    return [replace(cell, label=label_of(cell.model, cell.ratio, cell.method, cell.recovery)) for cell in cells]


def _in_order(cells: list[Cell], seen: list[Cell]) -> list[Cell]:
    """Sort rows, with models and methods in the order in which they were first planned."""
    models = list(dict.fromkeys(cell.model for cell in seen))
    methods = list(dict.fromkeys(cell.method for cell in seen))

    def turn(cell: Cell) -> tuple[int, float, int, bool]:
        return models.index(cell.model), cell.ratio or 0.0, methods.index(cell.method), cell.recovery != NONE

    return sorted(cells, key=turn)
