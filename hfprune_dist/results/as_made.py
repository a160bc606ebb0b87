"""The stages that results were actually made from, where a plan names equivalent ones that never ran."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

from hfprune_dist.errors import UserError
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Stage


def as_made(plan: Plan, store: Store) -> Plan:
    """The plan with the stages that made its artifacts, so that rows carry the cost of what actually ran.

    A prune stage identifies its calibration pass only by the criteria that it reads. Its artifact thus stays valid when
    methods are added or removed, although today's pass, which scores for other methods too, may never have run.
    """
    made: dict[str, Stage] = {}
    cells = []
    for cell in plan.cells:
        instead = dict(_instead(cell, plan, store))
        made |= {stage.id: stage for stage in instead.values()}
        producers = tuple(instead[it].id if it in instead else it for it in cell.producers)
        cells.append(replace(cell, producers=producers))
    return replace(plan, stages={**made, **plan.stages}, cells=tuple(cells))


def _instead(cell: Cell, plan: Plan, store: Store) -> Iterator[tuple[str, Stage]]:
    """(id of a planned stage without an artifact, the stage whose artifact was read in its place)."""
    for stage_id in cell.producers:
        recorded = (store.handle(stage_id).manifest() or {}).get("stage", {}).get("inputs", {})
        for role, planned in plan.stages[stage_id].inputs.items():
            location = recorded.get(role, {}).get("location", planned.location)
            if location == planned.location or not planned.is_stage or store.handle(planned.location).manifest():
                continue
            manifest = store.handle(location).manifest()
            with suppress(UserError):  # planned by a version with other fingerprints
                if manifest is not None:
                    yield planned.location, Stage.from_json(manifest["stage"])
