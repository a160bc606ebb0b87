"""The plan: the rows of a sweep's table and the stages that they need; and earlier rows of a folder, which stay."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from hfprune_dist.errors import UserError
from hfprune_dist.store.stage import Input, Stage

# Values of a row's recovery: there is none, or the method's own training takes its place.
NONE, OWN = "none", "own"
# Stands between a recipe and the ratios of earlier rounds.
VIA = "via"


@dataclass(frozen=True)
class Cell:
    """One row of the result table: a checkpoint and its evaluation.

    ``label`` is its name within the sweep. ``ratio`` and ``method`` are None for the dense model; ``producers`` are the
    stages that make the checkpoint, in order; ``efficiency`` and ``check`` are None if not asked for.
    ``recovery`` is the name of the recipe, ``none``, or ``own`` if the row's method prunes while it trains; with
    ``rounds``, the ratios at which the model was pruned and trained before, they follow the name (``recovery_name``).
    """

    label: str
    model: str
    ratio: float | None
    method: str | None
    criterion: str | None
    recovery: str
    producers: tuple[str, ...]
    evaluate: str
    efficiency: str | None = None
    check: str | None = None
    rounds: tuple[float, ...] = ()

    @property
    def results(self) -> tuple[str, ...]:
        """Ids of the stages whose artifacts make up the row: its checkpoint, if it isn't dense, and measurements."""
        measured = (self.check, self.efficiency, self.evaluate)
        return *self.producers[-1:], *(stage_id for stage_id in measured if stage_id is not None)


@dataclass(frozen=True)
class Plan:
    """All stages in an order in which they can run, and the cells they serve.

    Attributes:
        asked: ids of stages that are wanted for their own sake: passes with further criteria to compare.
    """

    stages: Mapping[str, Stage]
    cells: tuple[Cell, ...]
    asked: tuple[str, ...] = ()

    def lacking(self, is_done: Callable[[str], bool], wanted: Iterable[str] | None = None) -> list[str]:
        """Ids of the stages that must run, in order, for the artifacts of the stages in ``wanted`` (None: of all rows,
        and those asked for). Stages that only serve existing results may lack their artifacts.
        """
        results = (stage_id for cell in self.cells for stage_id in cell.results)
        left, missing = [*self.asked, *results] if wanted is None else list(wanted), set()
        while left:
            stage_id = left.pop()
            if stage_id not in missing and not is_done(stage_id):
                missing.add(stage_id)
                left += self.stages[stage_id].needs
        return [stage_id for stage_id in self.stages if stage_id in missing]

    def upstream(self, cell: Cell) -> list[str]:
        """Ids of all stages whose cost a row carries, in order; the evaluation is the last."""
        needs = (need for stage_id in cell.results for need in self.stages[stage_id].needs)
        return [*dict.fromkeys([*cell.producers, *needs, *cell.results])]

    def dense_folder(self, stage: Stage) -> Path:
        """The folder of the user's checkpoint that a stage's model is, or was made from."""
        source = stage.inputs["model"]
        return self.dense_folder(self.stages[source.location]) if source.is_stage else Path(source.location)

    def to_json(self) -> dict[str, Any]:
        stages = [stage.to_json() for stage in self.stages.values()]
        return {"stages": stages, "cells": [asdict(cell) for cell in self.cells], "asked": list(self.asked)}

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> Plan:
        stages = [Stage.recorded(stage) for stage in record["stages"]]
        rows = [{**cell, **{name: tuple(cell[name]) for name in ("producers", "rounds")}} for cell in record["cells"]]
        cells = [Cell(**row) for row in rows]
        return cls({stage.id: stage for stage in stages}, tuple(cells), tuple(record["asked"]))


def label_of(model: str, ratio: float | None, method: str | None, recovery: str) -> str:
    """The label of a row."""
    pruned = f"{model} dense" if ratio is None else f"{model} {ratio:g} {method}"
    return pruned if recovery in (NONE, OWN) else f"{pruned} + {recovery}"


def recovery_name(recovery: str, rounds: Iterable[float]) -> str:
    """The recovery of a row whose model was pruned and trained at other ratios before."""
    before = ", ".join(f"{ratio:g}" for ratio in rounds)
    return f"{recovery} {VIA} {before}" if before else recovery


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
    cells = _in_order([*today.cells, *kept], [*earlier.cells, *today.cells])
    return replace(today, stages=stages, cells=tuple(cells))


def refuse_other_checkpoints(today: Plan, earlier: Plan, out: Path) -> None:
    """Refuse a model if earlier rows of another checkpoint with its name would stay in the folder ``out``: what rows
    say of their dense model is known by its name alone, so they would be described as made from today's.
    """
    now = {cell.model: _dense(today, cell) for cell in today.cells}
    for cell in _not_replaced(today, earlier):
        dense = _dense(earlier, cell)
        if cell.model in now and dense.identity != now[cell.model].identity:
            raise UserError(
                f"--out {out}: its row {cell.label!r}, which stays, is of another checkpoint ({dense.location}, as it "
                f"was) than its model {cell.model!r} ({now[cell.model].location}); give the model another name through "
                f"an alias, use another --out, or remove the row first: --forget {shlex.quote(cell.label)}"
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


def _in_order(cells: list[Cell], seen: list[Cell]) -> list[Cell]:
    """Sort rows, with models and methods in the order in which they were first planned."""
    models = list(dict.fromkeys(cell.model for cell in seen))
    methods = list(dict.fromkeys(cell.method for cell in seen))
    recoveries = [NONE, *dict.fromkeys(cell.recovery for cell in seen)]

    def turn(cell: Cell) -> tuple[int, float, int, int]:
        at = recoveries.index(cell.recovery)
        return models.index(cell.model), cell.ratio or 0.0, methods.index(cell.method), at

    return sorted(cells, key=turn)
