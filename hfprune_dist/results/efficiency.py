"""Speed and memory in a row: the most demanding workload in a few columns, and all workloads by name."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

COLUMNS = (
    *("decode_speed", "decode_speed_min", "decode_speed_max", "decode_tokens_per_s"),
    *("first_token_speed", "time_to_first_token_s", "generation_memory_bytes"),
    *("flops_per_token", "cache_bytes_per_token"),
)


def efficiency_of(manifest: Mapping[str, Any] | None) -> dict[str, Any]:
    """Columns of a row, and all measurements under ``efficiency``; None where nothing was measured.

    ``decode_speed`` and ``first_token_speed`` are multiples of the dense model's, from generations in alternation.

    Args:
        manifest: manifest of the row's efficiency stage; None if there is none.
    """
    if manifest is None:
        return dict.fromkeys(COLUMNS) | {"efficiency": None}
    metrics = manifest["metrics"]
    costs, run = metrics["model"], metrics["runs"][-1]
    model, speed = run["model"], run["decode_speed"]
    return {
        "decode_speed": speed["median"],
        "decode_speed_min": speed["min"],
        "decode_speed_max": speed["max"],
        "decode_tokens_per_s": model["decode_tokens_per_s"]["median"],
        "first_token_speed": run["first_token_speed"]["median"],
        "time_to_first_token_s": model["time_to_first_token_s"]["median"],
        "generation_memory_bytes": model["peak_memory_bytes"],
        "flops_per_token": costs["flops_per_token"],
        "cache_bytes_per_token": costs["cache_bytes_per_token"],
        "efficiency": {key: value for key, value in metrics.items() if key != "dense"},
    }


def by_workload(row: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield (name, value) of each measurement under each workload, for a flat table; the values are medians."""
    for run in (row["efficiency"] or {}).get("runs", ()):
        where = f"efficiency/{workload(run)}"
        for name, value in run["model"].items():
            yield f"{where}/{name}", value["median"] if isinstance(value, Mapping) else value
        for name in ("first_token_speed", "decode_speed"):
            yield f"{where}/{name}", run[name]["median"]


def workload(run: Mapping[str, Any]) -> str:
    """Label of a workload: what was generated."""
    return f"batch {run['batch_size']}, {run['prompt_tokens']} in, {run['new_tokens']} out"
