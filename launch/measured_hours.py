"""Hours that stages took, from the manifests in a store: the only ones that are told in advance."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from statistics import fmean

from rich.console import Console

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import listed
from hfprune_dist.store.stage import Stage

NO_RUN = "no run yet"


def measured_hours(plan: Plan, store: Store) -> Callable[[Stage], float | None]:
    """Return what tells the hours that finished stages of a stage's kind and model took on average; None if there is
    none.
    """
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kind in {stage.kind for stage in plan.stages.values()}:
        for folder in listed(store.root / kind, "[!.]*"):
            manifest = store.handle(f"{kind}/{folder.name}").manifest()
            if manifest is not None and manifest.get("wall_time_s") is not None:
                took[kind, _model_in(manifest["stage"]["label"])].append(manifest["wall_time_s"] / 3600)

    def hours(stage: Stage) -> float | None:
        of_kind = took.get((stage.kind, _model_in(stage.label)))
        return fmean(of_kind) if of_kind else None

    return hours


def _model_in(label: str) -> str:
    """Return the first word of a label, such as ``llama 0.2 hfprune``."""
    return label.partition(" ")[0]


def show_hours(console: Console, plan: Plan, store: Store, todo: Sequence[str]) -> None:
    """Print how long the stages in ``todo`` may take, as far as stages like them have been run."""
    hours_of = measured_hours(plan, store)
    stages = Counter((stage.kind, hours_of(stage)) for stage in (plan.stages[stage_id] for stage_id in todo))
    if stages:
        told = [f"{kind} {n} x {NO_RUN if hours is None else f'{hours:.2g} h'}" for (kind, hours), n in stages.items()]
        console.print(f"\nby finished stages of the same kind and model: {', '.join(told)}", soft_wrap=True)
