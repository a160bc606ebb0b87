"""Rows of a table, as ``collect_rows`` gives them, and artifacts behind rows, without a sweep."""

from __future__ import annotations

from typing import Any

from made_stages import being_made

from hfprune_dist.results.markdown import cells
from hfprune_dist.results.rows import Row
from hfprune_dist.results.table import columns
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Stage

MEASURES = {"perplexity": 17.52, "kl": 0.26294, "top1_agreement": 0.7617}
ERRORS = {"perplexity_stderr": 0.51, "kl_stderr": 0.01234, "top1_agreement_stderr": 0.0151}
AVERAGE = {"average": 0.6833, "average_stderr": 0.0423}
COSTS = {"training_tokens": 10_240, "training_flops": 4.5e13, "device_hours": 0.073}


def row_of(model: str = "llama", ratio: float = 0.2, method: str | None = "surgeon-plain", **changes: Any) -> Row:
    """Return a finished row of a usual sweep, modified by ``changes``."""
    method = method if ratio else None
    scores = {"acc_norm": 0.7333, "acc_norm_stderr": 0.0576}
    row = {
        "label": f"{model} {ratio:g} {method}",
        "model": model,
        "ratio": ratio,
        "ratio_reached": ratio,
        "share_kept": 1 - ratio,
        "parameters": 134_515_008,
        "intermediate_size": 1536,
        "method": method,
        "criterion": "surgeon",
        "recovery": "lora",
        **MEASURES,
        **ERRORS,
        "windows": 24,
        "tokens": 6144,
        "other_texts": {},
        "tasks": {"demo_docstring": scores},
        **AVERAGE,
        "weight_bytes": 269_000_000,
        "efficiency": None,
        "engines": {},
        "stages": {f"evaluate/{model} {ratio} {method}": 100.0, f"importance/{model}": 180.0},
        "own_time_s": 264.0,
        "wall_time_s": 444.0,
        **COSTS,
        "peak_memory_bytes": 2_400_000_000,
        "checkpoint": "checkpoints/llama-0.2-surgeon-plain-lora",
        "provenance": None,
        "measured_as": "0123456789ab",
        "status": "done",
        "cause": None,
    }
    return row | changes


def efficiency(factor: float, tokens_per_s: float, seconds: float) -> dict[str, Any]:
    """Return metrics of an efficiency stage with two workloads, the first of which is as fast as the dense model."""

    def spread(value: float) -> dict[str, float]:
        return {"median": value, "min": 0.9 * value, "max": 1.1 * value}

    model = {"decode_tokens_per_s": spread(tokens_per_s), "time_to_first_token_s": spread(seconds)}
    model |= {"peak_memory_bytes": 3_000_000}
    runs = [
        {"batch_size": batch_size, "prompt_tokens": 32, "new_tokens": 16, "model": model, "dense": model}
        | {"decode_speed": spread(speed), "first_token_speed": spread(speed)}
        for batch_size, speed in ((1, 1.0), (4, factor))
    ]
    costs = {"flops_per_token": 215_000_000, "cache_bytes_per_token": 46_080}
    where = {"engine": "transformers 5", "device": "a processor", "threads": 2, "cores": 2}
    return {**where, "model": costs, "dense": costs, "runs": runs}


def make_artifact(store: Store, stage: Stage) -> None:
    """Write an artifact from which a row can be collected, as if its stage had run."""
    metrics = {"fidelity": {"perplexity": 9.0, "kl": 0.5, "top1_agreement": 0.5}, "tasks": {}}
    shape = {"ratio_reached": 0.1, "parameters": 5, "intermediate_size": 7, "intermediate_sizes": None}
    measured = metrics | shape | efficiency(1.5, tokens_per_s=30.0, seconds=0.1)
    costs = {"world_size": 1, "wall_time_s": 1.0, "peak_memory_bytes": 1}
    with being_made(store, stage, metrics=measured, **costs) as draft:
        (draft / "content").write_text(stage.id)


def shown(rows: list[Row], *, wide: bool = False) -> dict[str, tuple[str, ...]]:
    """Map each header to what it shows for each row."""
    found = columns(rows, wide)
    return dict(zip([column.header for column in found], zip(*cells(rows, found), strict=True), strict=True))


def missing(row: Row) -> Row:
    """Return the same row before anything of it was made."""
    unknown = [*MEASURES, *ERRORS, *AVERAGE, *COSTS, "windows", "tokens", "parameters"]
    unknown += ["ratio_reached", "share_kept", "weight_bytes", "own_time_s", "wall_time_s", "checkpoint"]
    unknown += ["peak_memory_bytes"]
    none = {key: {} for key in ("tasks", "other_texts")}
    nothing = {**none, "status": "missing", "cause": "prune has not run yet"}
    return row | dict.fromkeys(unknown) | nothing | {"stages": dict.fromkeys(row["stages"])}
