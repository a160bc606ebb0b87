"""``kept.json`` next to a pruned checkpoint: the layers and units that stayed, in the dense model's numbering."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.structures.kept import Kept

KEPT = "kept.json"


def write_kept(folder: Path, kept: Kept) -> None:
    """Write ``kept.json``: ``layers`` and, for each kind, the units kept in each of these layers."""
    units = {kind: [row.tolist() for row in rows] for kind, rows in kept.units.items()}
    write_json(folder / KEPT, {"layers": list(kept.layers), **units})


def read_kept_numbers(folder: Path) -> tuple[tuple[int, ...], Mapping[str, Sequence[Sequence[int]]]]:
    """Read ``kept.json`` without torch: the layers, and kind -> the units of each of them."""
    content = json.loads((folder / KEPT).read_text(encoding="utf-8"))
    return tuple(content.pop("layers")), content


def read_kept(folder: Path) -> Kept:
    """Read ``kept.json``."""
    import torch

    layers, numbers = read_kept_numbers(folder)
    return Kept(
        layers, {kind: [torch.tensor(row, dtype=torch.int64) for row in rows] for kind, rows in numbers.items()}
    )
