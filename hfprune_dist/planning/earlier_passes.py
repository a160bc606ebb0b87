"""Reuse of a folder's calibration passes in place of planned ones that would compute part of the same scores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hfprune_dist.config.parameters import ImportanceParameters
from hfprune_dist.planning.plan import Plan
from hfprune_dist.planning.stages_instead import with_instead
from hfprune_dist.store.stage import Stage


def with_earlier_passes(today: Plan, earlier: Plan, is_done: Callable[[str], bool]) -> Plan:
    """Today's plan with passes replaced by those of an earlier run that contain their scores already.

    Args:
        is_done: whether the stage with this id has its artifact.
    """
    wanted = [stage for stage in today.stages.values() if stage.kind == "importance" and not is_done(stage.id)]
    made = [it for it in earlier.stages.values() if it.kind == "importance" and is_done(it.id)] if wanted else []
    holding = ((stage, next((it for it in made if _holds(it, stage)), None)) for stage in wanted)
    return with_instead(today, {stage.id: found for stage, found in holding if found is not None})


def _holds(made: Stage, wanted: Stage) -> bool:
    """Whether a pass contains all scores of another with the same bits."""
    has, asks = made.params, wanted.params
    if not isinstance(has, ImportanceParameters) or not isinstance(asks, ImportanceParameters):
        return False
    is_part = {*asks.criteria} <= {*has.criteria} and {*asks.structures} <= {*has.structures}
    if not is_part:
        return False
    return replace(made, params=has.scoring(asks.criteria, asks.structures)).id == wanted.id
