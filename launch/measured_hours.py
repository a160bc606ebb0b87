"""Hours that stages took, from the manifests in a store: the only ones that are told in advance."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import listed
from hfprune_dist.store.stage import Stage

NO_RUN = "no run yet"


def measured_hours(plan: Plan, store: Store) -> Callable[[Stage], float | None]:
    """Return what tells the hours that finished stages of a stage's kind took on average, for models pruned from the
    same dense one; None if there is none.
    """

    def inputs_of(stage_id: str) -> Mapping[str, Any]:
        planned = plan.stages.get(stage_id)
        record = (store.handle(stage_id).manifest() or {}).get("stage", {}) if planned is None else planned.to_json()
        return dict(record.get("inputs", {}))

    def dense_model(stage_id: str) -> str | None:
        source = inputs_of(stage_id).get("model")
        if source is None:
            return None
        return dense_model(source["location"]) if source.get("is_stage") else str(source["location"])

    took: dict[tuple[str, str | None], list[float]] = defaultdict(list)
    for kind in {stage.kind for stage in plan.stages.values()}:
        for folder in listed(store.root / kind, "[!.]*"):
            stage_id = f"{kind}/{folder.name}"
            seconds = (store.handle(stage_id).manifest() or {}).get("wall_time_s")
            if seconds is not None:
                took[kind, dense_model(stage_id)].append(seconds / 3600)

    def hours(stage: Stage) -> float | None:
        of_kind = took.get((stage.kind, dense_model(stage.id)))
        return sum(of_kind) / len(of_kind) if of_kind else None

    return hours


def show_hours(console: Console, plan: Plan, store: Store, todo: Sequence[str]) -> None:
    """Print how long the stages in ``todo`` may take, as far as stages like them have been run."""
    hours_of = measured_hours(plan, store)
    stages = Counter((stage.kind, hours_of(stage)) for stage in (plan.stages[stage_id] for stage_id in todo))
    if stages:
        told = (
            f"{kind} {count} x {NO_RUN if hours is None else f'{hours:.2g} h'}"
            for (kind, hours), count in stages.items()
        )
        console.print(f"\nby finished stages of the same kind and model: {', '.join(told)}", soft_wrap=True)
