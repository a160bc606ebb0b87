"""Rows of a table from committed artifacts; a cell without a result has a cause instead of numbers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.checkpoints import CHECKPOINTS, checkpoint_names, made_checkpoint
from hfprune_dist.results.metrics import OF_TEXT, average
from hfprune_dist.store.artifacts import Manifest, Store
from hfprune_dist.store.attempts import Ledger
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.stage import CUTTING, kind_of
from hfprune_dist.structures.experts import EXPERT_COUNT_KEYS, SHARED_WIDTHS
from hfprune_dist.structures.units import plural_of

Row = dict[str, Any]
# Values of a row's status: it has its result; a stage behind it failed or was damaged; or it hasn't been made yet.
DONE, FAILED, MISSING = "done", "failed", "missing"
NOT_RUN = "has not run yet"  # how the cause of what is only missing ends
# Key of what a check in engines found, by engine; and of a sentence on what more training would give.
ENGINES = "engines"

# Header -> fields of config.json, of which a model has at most one.
SIZES = {
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "KV heads": ("num_key_value_heads",),
    "experts": EXPERT_COUNT_KEYS,
    "expert width": ("moe_intermediate_size",),
    "shared expert width": SHARED_WIDTHS,
    "width": ("intermediate_size",),
}
SIZE_FIELDS = tuple(field for fields in SIZES.values() for field in fields)
# The same where layers differ, a list with each layer's.
BY_LAYER = tuple(map(plural_of, SIZE_FIELDS))


@dataclass(frozen=True)
class DenseModel:
    """Facts in a dense row that no stage measures; ``sizes`` are the fields of config.json in ``SIZES``."""

    parameters: int
    sizes: Mapping[str, int]
    weight_bytes: int | None = None
    has_vision: bool = False

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> DenseModel:
        stated = (units.sizes(units.counts).items() for units in checkpoint.structures.values())
        sizes = {name: size for each in stated for name, size in each if name in SIZE_FIELDS and size is not None}
        return cls(checkpoint.parameters, sizes, checkpoint.bytes_on_disk, checkpoint.family.has_vision)


def collect_rows(plan: Plan, store: Store, dense: Mapping[str, DenseModel]) -> list[Row]:
    """One row per cell, in plan order; ``cause`` says what it lacks, and why.

    ``checkpoint`` is a folder, relative to the sweep's: the one with the row's name if it has the row's checkpoint,
    else the artifact's; None for the dense model, and if it isn't there yet. ``dense`` has facts by a model's name.
    """
    rows = _Rows(plan, store, dense)
    return [rows.row(cell) for cell in plan.cells]


class _Rows:
    """Rows of a plan, from manifests that are read once."""

    def __init__(self, plan: Plan, store: Store, dense: Mapping[str, DenseModel]) -> None:
        self._plan = plan
        self._store = store
        self._dense = dense
        rows_behind = Counter(stage_id for cell in plan.cells for stage_id in plan.upstream(cell))
        self._shared = {stage_id for stage_id, rows in rows_behind.items() if rows > 1}
        self._manifests = {stage_id: store.handle(stage_id).manifest() for stage_id in rows_behind}
        self._names = {cell: name for name, cell in checkpoint_names(plan.cells).items()}
        self._checkpoints = store.root.parent / CHECKPOINTS

    def row(self, cell: Cell) -> Row:
        plan, dense = self._plan, self._dense[cell.model]
        manifests = {stage_id: self._manifests[stage_id] for stage_id in plan.upstream(cell)}
        evaluation = manifests[cell.evaluate]
        # The row is complete even without its speed, and without engines.
        besides = [stage_id for stage_id in (cell.efficiency, cell.check) if stage_id]
        needed = [stage_id for stage_id in cell.results if stage_id not in besides]
        missing = plan.lacking(lambda stage_id: manifests[stage_id] is not None, needed)
        status, cause = self._cause(missing[0]) if missing else (DONE, None)
        for stage_id in (stage_id for stage_id in besides if manifests[stage_id] is None):
            del manifests[stage_id]
            lacks = "speed" if stage_id == cell.efficiency else "check"
            cause = cause or f"no {lacks}: {self._cause(stage_id)[1]}"
        metrics: Mapping[str, Any] = evaluation["metrics"] if evaluation else {}
        tasks = metrics.get("tasks", {})
        mean, error = average(tasks)
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
            "average": mean,
            "average_stderr": error,
            "weight_bytes": _weight_bytes(manifests[cell.producers[-1]]) if cell.producers else dense.weight_bytes,
            **_efficiency(manifests.get(cell.efficiency or "")),
            **self._costs(cell, manifests),
            ENGINES: checked["metrics"]["engines"] if (checked := manifests.get(cell.check or "")) else {},
            "checkpoint": self._checkpoint(cell),
            "provenance": _provenance(evaluation) if evaluation else None,
            "measured_as": self._measured_as(cell, manifests),
            "status": status,
            "cause": cause,
        }

    def _measured_as(self, cell: Cell, manifests: Mapping[str, Manifest | None]) -> str:
        """Digest of all that scores depend on besides the model, and of the versions of libraries that made the row:
        rows in which it is the same can be compared.
        """
        evaluation = self._plan.stages[cell.evaluate]
        inputs = {role: source.identity for role, source in evaluation.inputs.items() if role != "model"}
        made = [manifests[stage_id] for stage_id in (*cell.producers, cell.evaluate)]
        packages = {digest_of(found.get("provenance", {}).get("packages")) for found in made if found}
        return digest_of([evaluation.params.to_json(), inputs, sorted(packages)])[:12]

    def _checkpoint(self, cell: Cell) -> str | None:
        if not cell.producers or self._manifests[cell.producers[-1]] is None:
            return None
        name, made = self._names[cell], cell.producers[-1]
        is_named = made_checkpoint(self._checkpoints / name) == made
        return f"{CHECKPOINTS}/{name}" if is_named else f"{self._store.root.name}/{made}"

    def _cause(self, stage_id: str) -> tuple[str, str]:
        """Status and cause of a row whose stage has no artifact; if that waits for another one, the other's."""
        stage, handle = self._plan.stages[stage_id], self._store.handle(stage_id)
        if (failure := Ledger(self._store).failure(stage_id)) is not None:
            return FAILED, f"{stage.kind} failed ({failure.cause}): {failure.in_one_line}"
        if handle.manifest() is None and (verdict := handle.verify()).state == "corrupt":
            return FAILED, f"{handle.artifact}: {verdict.reason}; run the sweep again, which makes it anew"
        waiting_for = next((need for need in stage.needs if not self._store.handle(need).is_committed()), None)
        return self._cause(waiting_for) if waiting_for else (MISSING, f"{stage.kind} {NOT_RUN}")

    def _costs(self, cell: Cell, manifests: Mapping[str, Manifest | None]) -> Row:
        """Seconds of each stage behind a row, and in total; the highest peak of a rank; and what making the row's
        checkpoint took, those stages included that it shares: tokens and operations of training, device-hours.
        """
        seconds = {stage_id: found.get("wall_time_s") if found else None for stage_id, found in manifests.items()}
        peaks = [found.get("peak_memory_bytes") if found else None for found in manifests.values()]
        making = [made for stage_id in cell.producers if (made := self._manifests[stage_id])]
        spent = {"training_tokens": 0, "training_flops": 0, "device_hours": 0.0}
        for made in making:
            tokens = made["metrics"].get("training_tokens", 0)
            spent["training_tokens"] += tokens
            spent["training_flops"] += tokens * made["metrics"].get("flops_per_token", 0)
            spent["device_hours"] += made["world_size"] * made["wall_time_s"] / 3600
        return {
            **(spent if len(making) == len(cell.producers) else dict.fromkeys(spent)),
            "stages": seconds,
            "own_time_s": sum_or_none(time for stage_id, time in seconds.items() if stage_id not in self._shared),
            "wall_time_s": sum_or_none(seconds.values()),
            "peak_memory_bytes": None if None in peaks else max(peak for peak in peaks if peak is not None),
        }


def sum_or_none(values: Iterable[float | None]) -> float | None:
    listed = list(values)
    return None if None in listed else sum(value for value in listed if value is not None)


def _weight_bytes(manifest: Manifest | None) -> int | None:
    """Bytes of a checkpoint's weights on disk, without the adapter in its own folder, which is merged into them."""
    files = manifest["files"].items() if manifest else ()
    return sum(entry["bytes"] for name, entry in files if "/" not in name and name.endswith(".safetensors")) or None


def _compared(fidelity: Mapping[str, Any]) -> Row:
    """Fields of a row from the comparison with the dense model on one text."""
    values = {name: fidelity.get(name) for metric in OF_TEXT for name in (metric, f"{metric}_stderr")}
    return {**values, "windows": fidelity.get("windows"), "tokens": fidelity.get("tokens")}


def _provenance(evaluation: Manifest) -> Row:
    """What a row's scores were computed with; the checkpoint's manifest has the same for the checkpoint."""
    seed, finished = evaluation.get("config", {}).get("seed"), evaluation.get("finished")
    date = None if finished is None else datetime.fromtimestamp(finished, UTC).isoformat(timespec="seconds")
    return {"date": date, "seed": seed, "device": evaluation.get("device"), **evaluation.get("provenance", {})}


def _shape(cell: Cell, manifests: Mapping[str, Manifest | None], dense: DenseModel) -> Row:
    """Reached ratio, parameters and sizes: the dense model's, or those reported by the stage that cut it last."""
    if cell.ratio is None:
        return {"ratio_reached": 0.0, "share_kept": 1.0, "parameters": dense.parameters, **dense.sizes}
    *_, cut = (found for stage_id, found in manifests.items() if kind_of(stage_id) in CUTTING)
    metrics: Mapping[str, Any] = cut["metrics"] if cut else {}
    reached = metrics.get("ratio_reached")
    return {
        "ratio_reached": reached,
        "share_kept": None if reached is None else 1 - reached,
        "parameters": metrics.get("parameters"),
        **{key: metrics[key] for key in (*SIZE_FIELDS, *BY_LAYER) if key in metrics},
    }


def _efficiency(manifest: Manifest | None) -> Row:
    """Speed and memory under the most demanding workload, and everything measured under ``efficiency``."""
    if manifest is None:
        return {"efficiency": None}
    metrics = manifest["metrics"]
    run = metrics["runs"][-1]
    return {
        "decode_speed": run["decode_speed"]["median"],
        "decode_tokens_per_s": run["model"]["decode_tokens_per_s"]["median"],
        "time_to_first_token_s": run["model"]["time_to_first_token_s"]["median"],
        "generation_memory_bytes": run["model"]["peak_memory_bytes"],
        **{key: metrics["model"][key] for key in ("flops_per_token", "cache_bytes_per_token")},
        "efficiency": {key: value for key, value in metrics.items() if key != "dense"},
    }
