"""Rows of a table from committed artifacts; a cell without a result has a cause instead of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TypeVar

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.errors import UserError
from hfprune_dist.planning.plan import NONE, Cell, Plan
from hfprune_dist.results.checkpoints import CHECKPOINTS, checkpoint_names, written_folders
from hfprune_dist.results.headline import average_errors, averages
from hfprune_dist.results.metrics import AVERAGES, OF_SPEED, OF_TEXT
from hfprune_dist.store.artifacts import Manifest, Store
from hfprune_dist.store.atomic_files import read_object
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.heartbeat import in_one_line
from hfprune_dist.store.stage import CUTTING, Stage, kind_of
from hfprune_dist.structures.experts import EXPERT_COUNT_KEYS, SHARED_WIDTHS
from hfprune_dist.structures.units import plural_of

Row = dict[str, Any]
T = TypeVar("T")

# Header -> field of config.json, of sizes that a stage also reports if it removed more than neurons. Those of experts
# have the same names for all models.
NUM_EXPERTS, SHARED_WIDTH = EXPERT_COUNT_KEYS[0], SHARED_WIDTHS[0]
OPTIONAL_SIZES = {
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "KV heads": "num_key_value_heads",
    "experts": NUM_EXPERTS,
    "expert width": "moe_intermediate_size",
    "shared expert width": SHARED_WIDTH,
}
BY_LAYER = tuple(plural_of(it) for it in ("intermediate_size", "num_attention_heads", "num_key_value_heads"))


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
        experts = {it: sizes[it] for it in (NUM_EXPERTS, "moe_intermediate_size", SHARED_WIDTH) if it in sizes}
        width, vision = sizes.get("intermediate_size"), checkpoint.family.has_vision
        return cls(checkpoint.parameters, width, checkpoint.bytes_on_disk, experts or None, vision)


def collect_rows(plan: Plan, store: Store, dense: Mapping[str, DenseModel]) -> list[Row]:
    """One row per cell, in plan order; ``status`` is done or missing, and ``cause`` says why it is missing.

    ``checkpoint`` is a folder, relative to the sweep's: the one with the row's name if it has the row's checkpoint,
    else the artifact's; None for the dense model, and if it isn't there yet.

    Args:
        store: the store in the sweep's folder.
        dense: model name -> facts about the dense checkpoint.
    """
    rows = _Rows(as_made(plan, store), store, dense)
    found = [rows.row(cell) for cell in rows.plan.cells]
    _add_shares_of_dense(found)
    return found


def as_made(plan: Plan, store: Store) -> Plan:
    """The plan with the stages that made its artifacts, so that rows carry the cost of what actually ran.

    A prune stage identifies its calibration pass only by the criteria that it reads. Its artifact thus stays valid when
    methods are added or removed, although today's pass, which scores for other methods too, may never have run.
    """
    made: dict[str, Stage] = {}
    cells = []
    for cell in plan.cells:
        instead = dict(_made_instead(cell, plan, store))
        made |= {stage.id: stage for stage in instead.values()}
        producers = tuple(instead[it].id if it in instead else it for it in cell.producers)
        cells.append(replace(cell, producers=producers))
    return replace(plan, stages={**made, **plan.stages}, cells=tuple(cells))


def _made_instead(cell: Cell, plan: Plan, store: Store) -> Iterator[tuple[str, Stage]]:
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


def measured_as(evaluation: Stage) -> str:
    """Digest of everything that an evaluation's scores depend on besides the evaluated model: rows in which it is the
    same can be compared.
    """
    inputs = {role: source.identity for role, source in evaluation.inputs.items() if role != "model"}
    return digest_of([evaluation.params.to_json(), inputs])[:12]


class _Rows:
    """Rows of a plan, from manifests that are read once."""

    def __init__(self, plan: Plan, store: Store, dense: Mapping[str, DenseModel]) -> None:
        self.plan = plan
        self._store = store
        self._dense = dense
        rows_behind = Counter(stage_id for cell in plan.cells for stage_id in plan.upstream(cell))
        self._shared = {stage_id for stage_id, rows in rows_behind.items() if rows > 1}
        self._manifests = {stage_id: store.handle(stage_id).manifest() for stage_id in rows_behind}
        self._names = {cell: name for name, cell in checkpoint_names(plan.cells).items()}
        self._written = written_folders(store.root.parent)

    def row(self, cell: Cell) -> Row:
        plan, dense = self.plan, self._dense[cell.model]
        manifests = {stage_id: self._manifests[stage_id] for stage_id in plan.upstream(cell)}
        evaluation = manifests[cell.evaluate]
        # The row is complete even without its speed.
        needed = [stage_id for stage_id in cell.results if stage_id != cell.efficiency]
        missing = plan.lacking_for(needed, lambda stage_id: manifests[stage_id] is not None)
        unmeasured = cell.efficiency if cell.efficiency and manifests[cell.efficiency] is None else None
        if unmeasured is not None:
            del manifests[unmeasured]
        cause = self._cause(missing[0]) if missing else None
        metrics: Mapping[str, Any] = evaluation["metrics"] if evaluation else {}
        tasks = metrics.get("tasks", {})
        errors = (f"{name}_stderr" for name in AVERAGES)
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
            "tasks": tasks,
            "samples": _samples(self._store.handle(cell.evaluate).artifact),
            **dict(zip(AVERAGES, averages(tasks), strict=True)),
            **dict(zip(errors, average_errors(tasks), strict=True)),
            "weight_bytes": weight_bytes_of(manifests[cell.producers[-1]]) if cell.producers else dense.weight_bytes,
            **_efficiency(manifests.get(cell.efficiency or "")),
            **self._times(manifests),
            **self._training(cell),
            "checkpoint": self._checkpoint(cell),
            "provenance": _provenance(evaluation) if evaluation else None,
            "measured_as": measured_as(plan.stages[cell.evaluate]),
            "status": "done" if cause is None else "missing",
            "cause": cause,
            "speed_cause": None if unmeasured is None else self._cause(unmeasured),
        }

    def _checkpoint(self, cell: Cell) -> str | None:
        if not cell.producers or self._manifests[cell.producers[-1]] is None:
            return None
        name, made = self._names[cell], cell.producers[-1]
        is_named = name in self._written and self._written[name].checkpoint == made
        return f"{CHECKPOINTS}/{name}" if is_named else f"{self._store.root.name}/{made}"

    def _cause(self, stage_id: str) -> str:
        """Why a stage has no artifact, in one line; for a stage that waits for another, the other's reason."""
        stage, handle = self.plan.stages[stage_id], self._store.handle(stage_id)
        failure = handle.failure()
        if failure is not None:
            return f"{stage.kind} failed ({failure.cause}): {in_one_line(failure.message)}"
        if handle.manifest() is None and (verdict := handle.verify()).state == "corrupt":
            return f"{handle.artifact}: {verdict.reason}; run the sweep again, which makes it anew"
        waiting_for = next((need for need in stage.needs if not self._store.handle(need).is_committed()), None)
        return self._cause(waiting_for) if waiting_for else f"{stage.kind} has not run yet"

    def _times(self, manifests: Mapping[str, Manifest | None]) -> Row:
        """Seconds of each stage behind a row, and in total of its own and of shared ones; the highest peak of a rank in
        any of them.
        """
        seconds = {stage_id: found.get("wall_time_s") if found else None for stage_id, found in manifests.items()}
        peaks = all_or_none(found.get("peak_memory_bytes") if found else None for found in manifests.values())
        return {
            "stages": seconds,
            "own_time_s": sum_or_none(seconds[it] for it in seconds if it not in self._shared),
            "shared_time_s": sum_or_none(seconds[it] for it in seconds if it in self._shared),
            "wall_time_s": sum_or_none(seconds.values()),
            "peak_memory_bytes": None if peaks is None else max(peaks),
        }

    def _training(self, cell: Cell) -> Row:
        """Cost of making a row's checkpoint, those stages included that it shares; tokens and operations of LoRA's
        training alone.
        """
        found = [self._manifests[stage_id] for stage_id in cell.producers]
        devices = dict.fromkeys(it.get("device") for it in found if it is not None)
        return {
            "training_tokens": sum_or_none(_trained(it)[0] for it in found),
            "training_flops": sum_or_none(_trained(it)[1] for it in found),
            "device_hours": sum_or_none(_device_hours(it) for it in found),
            "training_device": ", ".join(it for it in devices if it) or None,
        }


def _trained(manifest: Manifest | None) -> tuple[float | None, float | None]:
    """(tokens that LoRA was trained on, operations of that); 0 for stages that train nothing."""
    if manifest is None:
        return None, None
    tokens = manifest["metrics"].get("training_tokens", 0)
    return tokens, tokens * manifest["metrics"].get("flops_per_token", 0)


def _device_hours(manifest: Manifest | None) -> float | None:
    ranks, seconds = (None, None) if manifest is None else (manifest.get("world_size"), manifest.get("wall_time_s"))
    return None if ranks is None or seconds is None else ranks * seconds / 3600


def all_or_none(values: Iterable[T | None]) -> list[T] | None:
    """The values if all of them are known; None if one is missing."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return known if len(known) == len(listed) else None


def sum_or_none(values: Iterable[float | None]) -> float | None:
    """The sum of the values; None if one is missing."""
    known = all_or_none(values)
    return None if known is None else sum(known)


def weight_bytes_of(manifest: Manifest | None) -> int | None:
    """Bytes of a checkpoint's weights on disk, without the adapter in its own folder, which is merged into them."""
    files = manifest["files"].items() if manifest else ()
    return sum(entry["bytes"] for name, entry in files if "/" not in name and name.endswith(".safetensors")) or None


def _compared(fidelity: Mapping[str, Any]) -> Row:
    """Fields of a row from the comparison with the dense model on one text."""
    values = {name: fidelity.get(name) for metric in OF_TEXT for name in (metric, f"{metric}_stderr")}
    return {**values, "windows": fidelity.get("windows"), "tokens": fidelity.get("tokens")}


def _samples(evaluation: Path) -> dict[str, int]:
    """Task or group -> number of examples behind its scores, from an evaluation's own results."""
    samples: dict[str, int] = {}
    for task, found in ((read_object(evaluation / "results.json") or {}).get("tasks") or {}).items():
        members = {name: counts["effective"] for name, counts in found.get("n-samples", {}).items()}
        samples |= members
        samples.setdefault(task, sum(members.values()))
    return samples


def _provenance(evaluation: Manifest) -> Row:
    """What a row's scores were computed with; the checkpoint's manifest has the same for the checkpoint."""
    seed, finished = evaluation.get("config", {}).get("seed"), evaluation.get("finished")
    date = None if finished is None else datetime.fromtimestamp(finished, UTC).isoformat(timespec="seconds")
    return {"date": date, "seed": seed, "device": evaluation.get("device"), **evaluation.get("provenance", {})}


def _shape(cell: Cell, manifests: Mapping[str, Manifest | None], dense: DenseModel) -> Row:
    """Reached ratio, parameters and sizes: the dense model's, or those reported by the stage that cut it last."""
    if cell.ratio is None:
        sizes = {"parameters": dense.parameters, "intermediate_size": dense.intermediate_size}
        return {"ratio_reached": 0.0, "share_kept": 1.0, **sizes, **(dense.expert_widths or {})}
    *_, cut = (found for stage_id, found in manifests.items() if kind_of(stage_id) in CUTTING)
    metrics = _with_experts(cut["metrics"] if cut else {})
    reached, optional = metrics.get("ratio_reached"), (*OPTIONAL_SIZES.values(), *BY_LAYER)
    return {
        "ratio_reached": reached,
        "share_kept": None if reached is None else 1 - reached,
        "parameters": metrics.get("parameters"),
        "intermediate_size": metrics.get("intermediate_size"),
        **{key: metrics[key] for key in optional if key in metrics},
    }


def _with_experts(sizes: Mapping[str, Any]) -> Mapping[str, Any]:
    """Sizes with the number of experts and the width of the shared one, if any, under the same names for all models."""
    if not any(key in sizes for key in EXPERT_COUNT_KEYS):
        return sizes
    names = ((NUM_EXPERTS, EXPERT_COUNT_KEYS), (SHARED_WIDTH, SHARED_WIDTHS))
    return {**sizes, **{name: sizes[key] for name, keys in names for key in reversed(keys) if key in sizes}}


def _efficiency(manifest: Manifest | None) -> Row:
    """Speed and memory under the most demanding workload, and everything measured under ``efficiency``."""
    if manifest is None:
        return dict.fromkeys(OF_SPEED) | {"efficiency": None}
    metrics = manifest["metrics"]
    costs, run = metrics["model"], metrics["runs"][-1]
    model, speed = run["model"], run["decode_speed"]
    values = (
        *(speed["median"], speed["min"], speed["max"], model["decode_tokens_per_s"]["median"]),
        *(run["first_token_speed"]["median"], model["time_to_first_token_s"]["median"], model["peak_memory_bytes"]),
        *(costs["flops_per_token"], costs["cache_bytes_per_token"]),
    )
    measured = {key: value for key, value in metrics.items() if key != "dense"}
    return dict(zip(OF_SPEED, values, strict=True)) | {"efficiency": measured}


def _add_shares_of_dense(rows: Sequence[Row]) -> None:
    """Add to each row its average as a share of that of its model's dense row that was measured in the same way."""
    dense = {
        (row["model"], row["measured_as"]): row["average"]
        for row in rows
        if not row["ratio"] and row["recovery"] == NONE
    }
    for row in rows:
        whole = dense.get((row["model"], row["measured_as"]))
        row["average_of_dense"] = row["average"] / whole if whole and row["average"] is not None else None
