"""Calibration passes that a folder has already, in place of planned ones that would make a part of the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hfprune_dist.config.parameters import ImportanceParameters
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.stage import Stage


def with_earlier_passes(today: Plan, earlier: Plan, is_done: Callable[[str], bool]) -> Plan:
    """Today's plan, which runs no pass for scores that an earlier run's pass has made for more methods.

    Fingerprints stay: a stage knows a pass by what it reads of it alone.

    Args:
        is_done: whether a stage has its artifact.
    """
    wanted = [stage for stage in today.stages.values() if stage.kind == "importance" and not is_done(stage.id)]
    made = [it for it in earlier.stages.values() if it.kind == "importance" and is_done(it.id)] if wanted else []
    holding = ((stage, next((it for it in made if _holds(it, stage)), None)) for stage in wanted)
    return _with_instead(today, {stage.id: found for stage, found in holding if found is not None})


def _holds(made: Stage, wanted: Stage) -> bool:
    """Whether a pass has all scores of another, and they have the same bits; not so where criteria decide its end."""
    has, asks = made.params, wanted.params
    if not isinstance(has, ImportanceParameters) or not isinstance(asks, ImportanceParameters):
        return False
    is_part = {*asks.criteria} <= {*has.criteria} and {*asks.structures} <= {*has.structures}
    if has.calibration.settled is not None or not is_part:
        return False
    return replace(made, params=has.scoring(asks.criteria, asks.structures)).id == wanted.id


def _with_instead(plan: Plan, instead: dict[str, Stage]) -> Plan:
    """A plan in which some stages stand for others, by the others' ids."""
    ids = {stage_id: it.id for stage_id, it in instead.items()}
    stages: dict[str, Stage] = {}
    for stage_id, stage in plan.stages.items():
        inputs = {
            role: replace(source, location=ids.get(source.location, source.location))
            for role, source in stage.inputs.items()
        }
        # What stands for a pass reads the same, wherever the earlier plan had it from.
        standing = replace(instead.get(stage_id, stage), inputs=inputs, label=stage.label)
        stages.setdefault(standing.id, standing)
    cells = [replace(cell, producers=tuple(ids.get(it, it) for it in cell.producers)) for cell in plan.cells]
    return Plan(stages, tuple(cells), tuple(ids.get(it, it) for it in plan.asked))
