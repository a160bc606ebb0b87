"""Rows of a table from committed artifacts; a cell without a result has a cause instead of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.against_dense import AVERAGES, add_shares_of_dense
from hfprune_dist.results.as_made import as_made
from hfprune_dist.results.costs import CostTable
from hfprune_dist.results.details import read_details
from hfprune_dist.results.efficiency import efficiency_of
from hfprune_dist.results.headline import average_errors, averages
from hfprune_dist.results.known import all_or_none, sum_or_none
from hfprune_dist.results.measured_as import measured_as
from hfprune_dist.store.artifacts import Manifest, Store
from hfprune_dist.store.attempt import AttemptsOf
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.heartbeat import in_one_line
from hfprune_dist.store.stage import CUTTING, kind_of
from hfprune_dist.structures.experts import EXPERT_COUNT_KEYS, SHARED_WIDTHS
from hfprune_dist.structures.units import plural_of

Row = dict[str, Any]

# Measures of the comparison with the dense model on one text.
_MEASURED = ("perplexity", "kl", "top1_agreement")
# Fields that a prune stage also reports if it removed more than neurons.
LAYERS, KEY_VALUE_HEADS = "num_hidden_layers", "num_key_value_heads"
# Fields of mixtures of experts, whatever config.json calls them, next to the width of layers without experts.
NUM_EXPERTS = EXPERT_COUNT_KEYS[0]
EXPERT_WIDTHS = {
    "expert width": "moe_intermediate_size",
    "shared expert width": SHARED_WIDTHS[0],
}
_FIELDS = ("num_attention_heads", KEY_VALUE_HEADS)
_OF_MORE_THAN_NEURONS = (LAYERS, *_FIELDS, *map(plural_of, _FIELDS), NUM_EXPERTS, *EXPERT_WIDTHS.values())
BY_LAYER = ("intermediate_sizes", *map(plural_of, _FIELDS))


@dataclass(frozen=True)
class DenseModel:
    """Facts in a dense row that no stage measures.

    Attributes:
        weight_bytes: size of the files with its weights, as ``weight_bytes_of`` counts them.
        expert_widths: for a mixture of experts, field of config.json -> its value, and the number of experts.
        has_vision: whether it is a model of images and text.
    """

    parameters: int
    intermediate_size: int | None
    weight_bytes: int | None = None
    expert_widths: Mapping[str, int] | None = None
    has_vision: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> DenseModel:
        """Collect the facts from a dense checkpoint."""
        kinds = checkpoint.structures.values()
        sizes = _with_experts({name: size for it in kinds for name, size in it.sizes(it.counts).items()})
        experts = {field: sizes[field] for field in (NUM_EXPERTS, *EXPERT_WIDTHS.values()) if field in sizes}
        width, vision = sizes.get("intermediate_size"), checkpoint.family.has_vision
        return cls(checkpoint.parameters, width, checkpoint.bytes_on_disk, experts or None, vision)


def collect_rows(
    plan: Plan, store: Store, dense: Mapping[str, DenseModel], attempts_of: AttemptsOf = lambda _: ()
) -> list[Row]:
    """One row per cell, in plan order; ``status`` is done or missing, and ``cause`` says why it is missing.

    Args:
        dense: model name -> facts about the dense checkpoint.
        attempts_of: returns the attempts at a stage, as launchers recorded them.
    """
    plan = as_made(plan, store)
    rows_behind = Counter(stage_id for cell in plan.cells for stage_id in plan.upstream(cell))
    shared = {stage_id for stage_id, rows in rows_behind.items() if rows > 1}
    manifests = {stage_id: store.handle(stage_id).manifest() for stage_id in rows_behind}
    known = _Known(plan, store, manifests, shared, CostTable.of(plan, manifests, attempts_of, shared))
    rows = [_row(cell, known, dense[cell.model]) for cell in plan.cells]
    add_shares_of_dense(rows, plan)
    return rows


@dataclass(frozen=True)
class _Known:
    """The data from which rows are made.

    Attributes:
        manifests: stage id -> manifest; None if there is none.
        shared: ids of stages that several rows need.
    """

    plan: Plan
    store: Store
    manifests: Mapping[str, Manifest | None]
    shared: Set[str]
    costs: CostTable


def _row(cell: Cell, known: _Known, dense: DenseModel) -> Row:
    plan, store = known.plan, known.store
    manifests = {stage_id: known.manifests[stage_id] for stage_id in plan.upstream(cell)}
    evaluation = manifests[cell.evaluate]
    # The row is complete even without its speed.
    needed = [stage_id for stage_id in cell.results if stage_id != cell.efficiency]
    missing = plan.lacking_for(needed, lambda stage_id: manifests[stage_id] is not None)
    unmeasured = cell.efficiency if cell.efficiency and manifests[cell.efficiency] is None else None
    if unmeasured is not None:
        del manifests[unmeasured]
    cause = _cause(missing[0], plan, store) if missing else None
    metrics: Mapping[str, Any] = evaluation["metrics"] if evaluation else {}
    details = read_details(store.handle(cell.evaluate).artifact)
    return {
        "label": cell.label,
        "model": cell.model,
        "ratio": 0.0 if cell.ratio is None else cell.ratio,
        **_shape(cell, manifests, dense),
        "method": cell.method,
        "criterion": cell.criterion,
        "recovery": cell.recovery,
        **_compared(metrics.get("fidelity", {})),
        OTHER_TEXTS: {name: _compared(there) for name, there in metrics.get(OTHER_TEXTS, {}).items()},
        "tasks": metrics.get("tasks", {}),
        "samples": _samples(details),
        **_averages(metrics.get("tasks", {})),
        "weight_bytes": weight_bytes_of(manifests[cell.producers[-1]]) if cell.producers else dense.weight_bytes,
        **efficiency_of(manifests.get(cell.efficiency or "")),
        **_times(manifests, known.shared),
        **known.costs.of_row(cell),
        "peak_memory_bytes": _peak_memory(list(manifests.values())),
        "checkpoint": _checkpoint(cell, known),
        "provenance": _provenance(evaluation) if evaluation else None,
        "measured_as": digest_of(measured_as(plan.stages[cell.evaluate]))[:12],
        "status": "done" if cause is None else "missing",
        "cause": cause,
        "speed_cause": None if unmeasured is None else _cause(unmeasured, plan, store),
    }


def _checkpoint(cell: Cell, known: _Known) -> str | None:
    """Folder of the checkpoint made for a row; None for the dense model, and if it isn't there yet."""
    made = cell.producers[-1:]
    return str(known.store.handle(made[0]).artifact) if made and known.manifests[made[0]] is not None else None


def _compared(fidelity: Mapping[str, Any]) -> Row:
    """Fields of a row from the comparison with the dense model on one text; old evaluations have no standard errors."""
    values = {name: fidelity.get(name) for measure in _MEASURED for name in (measure, f"{measure}_stderr")}
    return {**values, "windows": fidelity.get("windows"), "tokens": fidelity.get("tokens")}


def _samples(details: Mapping[str, Any]) -> dict[str, int]:
    """Task or group -> number of examples behind its scores, from an evaluation's own results."""
    samples: dict[str, int] = {}
    for task, found in details.get("tasks", {}).items():
        members = {name: counts["effective"] for name, counts in found.get("n-samples", {}).items()}
        samples |= members
        samples.setdefault(task, sum(members.values()))
    return samples


def weight_bytes_of(manifest: Manifest | None) -> int | None:
    """Bytes of a checkpoint's weights on disk, without the adapter in its own folder, which is merged into them."""
    files = manifest["files"].items() if manifest else ()
    return sum(entry["bytes"] for name, entry in files if "/" not in name and name.endswith(".safetensors")) or None


def _provenance(evaluation: Manifest) -> Row:
    """What a row's scores were computed with; the checkpoint's manifest has the same for the checkpoint."""
    seed = evaluation.get("config", {}).get("seed")
    finished = evaluation.get("finished")
    date = None if finished is None else datetime.fromtimestamp(finished, UTC).isoformat(timespec="seconds")
    return {"date": date, "seed": seed, "device": evaluation.get("device"), **evaluation.get("provenance", {})}


def _cause(stage_id: str, plan: Plan, store: Store) -> str:
    """Why a stage has no artifact, in one line; for a stage that waits for another, the other's reason."""
    stage, handle = plan.stages[stage_id], store.handle(stage_id)
    failure = handle.failure()
    if failure is not None:
        return f"{stage.kind} failed ({failure.cause}): {in_one_line(failure.message)}"
    if handle.manifest() is None and (verdict := handle.verify()).state == "corrupt":
        return f"{handle.artifact}: {verdict.reason}; run the sweep again, which makes it anew"
    waiting_for = next((need for need in stage.needs if not store.handle(need).is_committed()), None)
    return _cause(waiting_for, plan, store) if waiting_for else f"{stage.kind} has not run yet"


def _shape(cell: Cell, manifests: Mapping[str, Manifest | None], dense: DenseModel) -> Row:
    """Reached ratio, parameters and sizes: the dense model's, or those reported by the stage that cut it last."""
    if cell.ratio is None:
        sizes: Row = {"parameters": dense.parameters, "intermediate_size": dense.intermediate_size}
        sizes |= dense.expert_widths or {}
        return {"ratio_reached": 0.0, **sizes, "intermediate_sizes": None}
    *_, cut = (found for stage_id, found in manifests.items() if kind_of(stage_id) in CUTTING)
    metrics = _with_experts(cut["metrics"] if cut else {})
    always = ("ratio_reached", "parameters", "intermediate_size", "intermediate_sizes")
    return {key: metrics.get(key) for key in (*always, *(key for key in _OF_MORE_THAN_NEURONS if key in metrics))}


def _with_experts(sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sizes with the number of experts and the width of the shared one, if any, under the same names for all models."""
    if not any(key in sizes for key in EXPERT_COUNT_KEYS):
        return sizes
    names = ((NUM_EXPERTS, EXPERT_COUNT_KEYS), (EXPERT_WIDTHS["shared expert width"], SHARED_WIDTHS))
    return {**sizes, **{name: sizes[key] for name, keys in names for key in reversed(keys) if key in sizes}}


def _averages(tasks: Mapping[str, Mapping[str, Any]]) -> Row:
    told: Row = {}
    for suffix, both in zip(("", "_stderr"), (averages(tasks), average_errors(tasks)), strict=True):
        told |= {f"{name}{suffix}": value for name, value in zip(AVERAGES, both, strict=True)}
    return told


def _times(manifests: Mapping[str, Manifest | None], shared: Set[str]) -> Row:
    """Seconds of the stages behind a row: of each, and in total for its own stages, for shared ones, and for all."""
    seconds = {stage_id: found.get("wall_time_s") if found else None for stage_id, found in manifests.items()}
    return {
        "stages": seconds,
        "own_time_s": sum_or_none(seconds[it] for it in seconds if it not in shared),
        "shared_time_s": sum_or_none(seconds[it] for it in seconds if it in shared),
        "wall_time_s": sum_or_none(seconds.values()),
    }


def _peak_memory(manifests: Sequence[Manifest | None]) -> int | None:
    """The highest peak of a rank in any stage behind a row; None if a stage is missing or didn't record it."""
    peaks = all_or_none(None if found is None else found.get("peak_memory_bytes") for found in manifests)
    return None if peaks is None else max(peaks)
