"""Stages of an earlier run in place of planned ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.store.stage import Stage


def with_instead(plan: Plan, instead: Mapping[str, Stage]) -> Plan:
    """Return a plan in which stages are replaced, and everything that names them names their replacements.

    Fingerprints of other stages stay the same: a stage identifies an input by its content, not by its location.

    Args:
        instead: id of a stage -> its replacement, which keeps the planned label.
    """
    if not instead:
        return plan
    ids = {stage_id: it.id for stage_id, it in instead.items()}

    def standing(stage_id: str) -> str:
        return ids.get(stage_id, stage_id)

    def with_ids(cell: Cell) -> Cell:
        efficiency = None if cell.efficiency is None else standing(cell.efficiency)
        return replace(cell, producers=tuple(map(standing, cell.producers)), efficiency=efficiency)

    stages: dict[str, Stage] = {}
    for stage_id, stage in plan.stages.items():
        inputs = {role: replace(it, location=standing(it.location)) for role, it in stage.inputs.items()}
        # A replacement reads the same content, wherever the earlier plan located it.
        its = replace(instead.get(stage_id, stage), inputs=inputs, label=stage.label)
        stages.setdefault(its.id, its)
    return Plan(stages, tuple(map(with_ids, plan.cells)), tuple(map(standing, plan.asked)))
