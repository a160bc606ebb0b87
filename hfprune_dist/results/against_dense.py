"""Quality of rows as shares of the dense model's, and of that before recovery."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from hfprune_dist.planning.plan import NONE, Cell, Plan
from hfprune_dist.results.headline import headline
from hfprune_dist.results.measured_as import measured_as
from hfprune_dist.store.stage import kind_of

if TYPE_CHECKING:  # rows are made with this
    from hfprune_dist.results.rows import Row

AVERAGES = ("average", "average_without_crows_pairs")


def add_shares_of_dense(rows: Sequence[Row], plan: Plan) -> None:
    """Add to each row its scores as shares of those of the dense row measured in the same way.

    Args:
        rows: one per cell of the plan, in order.
    """
    by_cell = list(zip(plan.cells, rows, strict=True))
    dense = {_scale(cell, plan): row for cell, row in by_cell if not cell.producers}
    bare = {_checkpoint(cell, plan): row for cell, row in by_cell if cell.recovery == NONE}
    for cell, row in by_cell:
        row |= _shares(row, dense.get(_scale(cell, plan)))
    for cell, row in by_cell:
        before = bare.get(_checkpoint(cell, plan)) if cell.recovery != NONE else None
        row |= {f"{it}_of_dense_before_recovery": before and before[f"{it}_of_dense"] for it in AVERAGES}


def _scale(cell: Cell, plan: Plan) -> str:
    """Key shared by rows that can be compared: those measured alike that come from the same dense model."""
    return repr((cell.model, measured_as(plan.stages[cell.evaluate])))


def _checkpoint(cell: Cell, plan: Plan) -> str:
    """Key of a row's checkpoint before recovery, and of how it is measured."""
    pruned = [it for it in cell.producers if kind_of(it) != "recover"]
    return repr((_scale(cell, plan), pruned))


def _shares(row: Row, dense: Row | None) -> Row:
    """A row's shares; None, and no tasks, if there is no dense row to compare with."""
    beside = dense or dict.fromkeys(AVERAGES)
    whole = {f"{name}_of_dense": _share(row[name], beside[name]) for name in AVERAGES}
    return {**whole, "tasks_of_dense": {} if dense is None else _of_tasks(row, dense)}


def _of_tasks(row: Row, dense: Row) -> dict[str, float]:
    shares = {task: _share(headline(scores), _score(dense, task)) for task, scores in row["tasks"].items()}
    return {task: share for task, share in shares.items() if share is not None}


def _score(row: Row, task: str) -> float | None:
    metrics: Mapping[str, float] = row["tasks"].get(task, {})
    return headline(metrics)


def _share(score: float | None, dense: float | None) -> float | None:
    """The score divided by the dense model's; None if one isn't known, or the dense model's is 0."""
    return None if score is None or not dense else score / dense
