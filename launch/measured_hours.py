"""Hours that stages took, from the manifests in a store: the only ones that are told in advance."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from statistics import fmean

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import listed
from hfprune_dist.store.stage import Stage

NO_RUN = "no run yet"


def measured_hours(plan: Plan, store: Store) -> Callable[[Stage], float | None]:
    """Return what tells how long finished stages of a kind and model took on average; None if there are none."""
    took: dict[tuple[str, str], list[float]] = defaultdict(list)
    for kind in {stage.kind for stage in plan.stages.values()}:
        for folder in listed(store.root / kind, "[!.]*"):
            manifest = store.handle(f"{kind}/{folder.name}").manifest()
            if manifest is not None and manifest.get("wall_time_s") is not None:
                took[kind, manifest["stage"]["label"].split()[0]].append(manifest["wall_time_s"] / 3600)
    # A label begins with the model, as in "llama 0.2 hfprune".
    average = {kind_and_model: fmean(hours) for kind_and_model, hours in took.items()}
    return lambda stage: average.get((stage.kind, stage.label.split()[0]))
