"""Section ``scaling``: memory and time of the calibration pass as a random model or a shard grows along one axis."""

from __future__ import annotations

from typing import Any

import torch
from hfprune_launch.benchmark.isolated import TIDY, call
from hfprune_launch.benchmark.measure import paired_ratios, peak_bytes
from hfprune_launch.benchmark.results import Chart, Findings, Line
from hfprune_launch.benchmark.settings import Settings
from hfprune_launch.benchmark.subject import random_subject

BASE = {"tokens": 1024, "vocabulary": 16384, "width": 256, "depth": 4, "micro-batches of a shard": 1}
AXES: dict[str, tuple[int, ...]] = {
    "tokens": (256, 512, 1024, 2048),
    "vocabulary": (16384, 32768, 65536, 131072),
    "width": (128, 256, 512, 768),
    "depth": (2, 4, 8, 16),
    "micro-batches of a shard": (1, 2, 4, 8),
}
# Axes along which our memory must not grow -> the most growth allowed from the first point to the last.
FLAT = {"vocabulary": 1.1, "micro-batches of a shard": 1.1}
METHODS = ("ours", "published")
HEAD_SIZE = 32
DTYPE = "bfloat16"
# Times are only drawn as curves, whose neighbouring points check each other; no line of the table uses them.
TIME_ROUNDS = 1


def measure_scaling(settings: Settings) -> Findings:
    """Chart memory along each axis, and time along all but the last; lines give the growth of memory over each axis."""
    lines: list[Line] = []
    charts: list[Chart] = []
    for axis, points in AXES.items():
        points = points[:: len(points) - 1] if settings.quick else points
        taken = call(f"{__name__}:take_memory", {"axis": axis, "points": points}, TIDY)
        unit = taken["ours"][0]
        curves = {method: [value / unit for value in values] for method, values in taken.items()}
        charts.append(Chart(f"memory by {axis}", axis, "memory above the model (ours, first = 1)", points, curves))
        growth = {method: values[-1] / values[0] for method, values in curves.items()}
        span = f"{axis} {points[0]:,} to {points[-1]:,}: memory"
        lines += [
            Line("scaling", f"{span}, {name}", growth[name], "x", FLAT.get(axis) if name == "ours" else None)
            for name in METHODS
        ]
        if axis in ("tokens", "vocabulary", "width", "depth"):
            times = call(f"{__name__}:time", {"axis": axis, "points": points}, {})
            charts.append(Chart(f"time by {axis}", axis, "time (forward = 1)", points, times))
    return Findings(lines, charts)


def take_memory(axis: str, points: list[int]) -> dict[str, list[int]]:
    """In a separate process: bytes above the model, by method, at each point."""
    taken: dict[str, list[int]] = {method: [] for method in METHODS}
    for point in points:
        subject, shard = _build({**BASE, axis: point})
        for method in METHODS:
            run = _runner(subject, shard, method)
            run(8)
            taken[method].append(peak_bytes(lambda run=run: run(None)))  # type: ignore[misc]
    return taken


def time(axis: str, points: list[int]) -> dict[str, list[float]]:
    """In a separate process: time in multiples of a forward pass, by method, at each point."""
    times: dict[str, list[float]] = {method: [] for method in METHODS}
    for point in points:
        subject, shard = _build({**BASE, axis: point})
        variants: dict[str, Any] = {method: _runner(subject, shard, method) for method in METHODS}
        ratios = paired_ratios({"forward": lambda: subject.forward(shard[0]), **variants}, "forward", TIME_ROUNDS)  # noqa: B023
        for method in METHODS:
            times[method].append(ratios[method])
    return times


def _build(case: dict[str, int]) -> tuple[Any, list[torch.Tensor]]:
    shape = {
        "vocab_size": case["vocabulary"],
        "hidden_size": case["width"],
        "intermediate_size": 3 * case["width"],
        "num_hidden_layers": case["depth"],
        "num_attention_heads": case["width"] // HEAD_SIZE,
        "num_key_value_heads": case["width"] // HEAD_SIZE,
        "max_position_embeddings": case["tokens"],
    }
    generator = torch.Generator().manual_seed(0)
    size = (1, case["tokens"])
    shard = [
        torch.randint(case["vocabulary"], size, generator=generator) for _ in range(case["micro-batches of a shard"])
    ]
    return random_subject(DTYPE, shape), shard


def _runner(subject: Any, shard: list[torch.Tensor], method: str) -> Any:
    """Return a function that runs a method over a shard, or over only the first ``tokens`` tokens of its windows."""

    def run(tokens: int | None = None) -> None:
        micro_batches = [input_ids_BT[:, :tokens] for input_ids_BT in shard]
        if method == "ours":
            subject.ours(micro_batches, ["entropy"])
        else:
            for input_ids_BT in micro_batches:
                subject.published(input_ids_BT)

    return run
