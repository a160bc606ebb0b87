"""The cost of training a row's checkpoint: tokens, floating-point operations and device-hours, by kind of stage."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.known import sum_or_none
from hfprune_dist.store.artifacts import Manifest
from hfprune_dist.store.attempt import Attempt, AttemptsOf
from hfprune_dist.store.stage import kind_of

# Costs of each stage, to be summed: tokens and FLOPs of LoRA training, device-hours of all stages. These cover all
# attempts, wasted ones only those that failed.
MEASURES = ("tokens", "flops", "device_hours", "wasted_device_hours")
# Kinds of stages that count as training; those that measure don't.
KINDS = ("importance", "prune", "distill", "recover", "loraprune")
OWN_STAGES, SHARED_STAGES = "own", "shared"


@dataclass(frozen=True)
class CostTable:
    """Costs of all stages of a plan.

    Attributes:
        costs: stage id -> measure -> its value, None if it isn't known; stages that train nothing are left out.
        devices: stage id -> type of device, cpu or cuda; None if it isn't known.
        shared: ids of stages that several rows need.
    """

    costs: Mapping[str, Mapping[str, float | None]]
    devices: Mapping[str, str | None]
    shared: Set[str]

    @classmethod
    def of(
        cls, plan: Plan, manifests: Mapping[str, Manifest | None], attempts_of: AttemptsOf, shared: Set[str]
    ) -> CostTable:
        """Read the costs from plan, manifests and the records of attempts."""
        costs: dict[str, Mapping[str, float | None]] = {}
        trained = {it: plan.stages[it] for cell in plan.cells for it in cell.producers if it in plan.stages}
        for stage_id, stage in trained.items():
            manifest = manifests.get(stage_id)
            told: tuple[float | None, ...] = (None,) * len(MEASURES)
            if manifest is not None:
                told = (*_trained(manifest), *device_hours(manifest, attempts_of(stage)))
            costs[stage_id] = dict(zip(MEASURES, told, strict=True))
        devices = {it: (manifests.get(it) or {}).get("device") for it in trained}
        return cls(costs, devices, shared)

    def of_row(self, cell: Cell) -> dict[str, Any]:
        """Cost columns of a row: sums over its own stages, over those that it shares, and by kind of stage."""
        own = [it for it in cell.producers if it not in self.shared]
        shared = [it for it in cell.producers if it in self.shared]
        told: dict[str, Any] = {}
        for whose, stage_ids in ((OWN_STAGES, own), (SHARED_STAGES, shared)):
            told |= {f"{whose}_training_{measure}": self._sum(stage_ids, measure) for measure in MEASURES}
        devices = dict.fromkeys(device for it in cell.producers if (device := self.devices[it]) is not None)
        return told | {"training_device": ", ".join(devices) or None, "costs": self._by_kind(cell.producers)}

    def _by_kind(self, stage_ids: Sequence[str]) -> dict[str, dict[str, float | None]]:
        """Sums by kind of stage; a reference on calibration windows counts towards the distillation that uses it."""
        groups: dict[str, list[str]] = {}
        for stage_id in stage_ids:
            kind = kind_of(stage_id)
            groups.setdefault(kind if kind in KINDS else "distill", []).append(stage_id)
        return {kind: {it: self._sum(members, it) for it in MEASURES} for kind, members in groups.items()}

    def _sum(self, stage_ids: Iterable[str], measure: str) -> float | None:
        """Sum of a measure over stages; None if it isn't known for one of them."""
        return sum_or_none(self.costs[it][measure] for it in stage_ids)


def _trained(manifest: Manifest) -> tuple[float, float]:
    """(tokens that LoRA was trained on, operations of that); 0 for stages that train nothing."""
    tokens = manifest["metrics"].get("training_tokens", 0)
    return tokens, tokens * manifest["metrics"].get("flops_per_token", 0)


def device_hours(manifest: Manifest, attempts: Iterable[Attempt]) -> tuple[float | None, float | None]:
    """(all attempts, failed attempts) at a stage: time times ranks, in hours.

    A later attempt may have resumed from part of a failed one's work. An attempt that was asked to end, and saved its
    work first, doesn't count as failed. Attempts whose beginning or end wasn't recorded count as nothing.
    """
    ranks, seconds = manifest.get("world_size"), manifest.get("wall_time_s")
    if ranks is None or seconds is None:
        return None, None
    saved, wasted = 0.0, 0.0
    for it in attempts:
        if it.state == "failed" and it.started is not None and it.ended is not None:
            spent = max(0.0, it.ended - it.started) * (it.ranks or ranks)
            saved, wasted = (saved + spent, wasted) if it.cause == "interrupted" else (saved, wasted + spent)
    return (seconds * ranks + saved + wasted) / 3600, wasted / 3600
