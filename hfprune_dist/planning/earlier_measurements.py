"""Reuse of measurements of efficiency whose device an earlier version described in other words."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from hfprune_dist.config.parameters import EfficiencyParameters
from hfprune_dist.planning.plan import Plan
from hfprune_dist.planning.stages_instead import with_instead
from hfprune_dist.store.stage import Stage


def with_earlier_measurements(today: Plan, device: str, stands: Callable[[str], bool]) -> Plan:
    """Return today's plan with measurements replaced by those that were planned for ``device``, if these stand.

    Args:
        stands: whether the stage with this id has its artifact, and what ran is what is planned today.
    """
    instead: dict[str, Stage] = {}
    for stage_id, stage in today.stages.items():
        if isinstance(stage.params, EfficiencyParameters) and stage.params.device != device:
            earlier = replace(stage, params=stage.params.model_copy(update={"device": device}))
            instead |= {stage_id: earlier} if stands(earlier.id) else {}
    return with_instead(today, instead)
