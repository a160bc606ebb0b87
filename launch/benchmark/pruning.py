"""Section ``prune``: writing a pruned checkpoint, compared with copying as many bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from hfprune_launch.benchmark.isolated import TIDY, call
from hfprune_launch.benchmark.measure import paired_ratios, peak_anonymous_bytes
from hfprune_launch.benchmark.results import Findings, Line
from hfprune_launch.benchmark.settings import RATIO, Settings
from hfprune_launch.benchmark.subject import kept_width

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.write_pruned import write_weight_file
from hfprune_dist.structures.kept import Kept


def measure_prune(settings: Settings) -> Findings:
    """Measure time in copies of the output, and peak anonymous memory in multiples of the largest tensor."""
    where = {"model": settings.model, "scratch": str(settings.scratch)}
    time = call(f"{__name__}:time_prune", {**where, "rounds": settings.rounds}, {})
    memory = call(f"{__name__}:take_memory", where, TIDY)
    return Findings(
        [
            Line("prune", "writing the pruned weights, time", time, "x cp", 1.5),
            Line("prune", "writing the pruned weights, anonymous memory", memory, "x largest tensor", 2.0),
        ]
    )


def time_prune(model: str, scratch: str, rounds: int) -> float:
    """In a separate process: time to write the pruned files over the time to copy them, both into an empty folder."""
    pruned, copied, sample = (Path(scratch) / name for name in ("pruned", "copied", "sample"))
    sample.mkdir(exist_ok=True)
    _write(model, sample)

    def prune() -> None:
        _make_anew(pruned)
        _write(model, pruned)

    def copy() -> None:
        _make_anew(copied)
        for file in sample.iterdir():
            shutil.copyfile(file, copied / file.name)

    return paired_ratios({"prune": prune, "cp": copy}, "cp", rounds)["prune"]


def take_memory(model: str, scratch: str) -> float:
    """In a separate process: peak anonymous memory, as a multiple of the largest tensor."""
    target = Path(scratch) / "pruned"
    target.mkdir(exist_ok=True)
    largest = max(info.bytes for info in open_checkpoint(Path(model)).tensors.values())
    return peak_anonymous_bytes(lambda: _write(model, target)) / largest


def _make_anew(folder: Path) -> None:
    """Make an empty folder: writing into the existing pages of a file is faster, but no stage does that."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()


def _write(model: str, target: Path) -> None:
    checkpoint = open_checkpoint(Path(model))
    width = kept_width(model, RATIO)
    generator = torch.Generator().manual_seed(0)
    rows = [
        torch.randperm(checkpoint.units.most, generator=generator)[:width].sort().values
        for _ in range(checkpoint.num_layers)
    ]
    kept = Kept.of_all_layers({checkpoint.units.kind: rows})
    for file in checkpoint.weight_files:
        write_weight_file(checkpoint, file, kept, target)
