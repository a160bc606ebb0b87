"""``kept.json`` next to a pruned checkpoint: the layers and units that stayed, in the dense model's numbering."""

from __future__ import annotations

from pathlib import Path

import torch

from hfprune_dist.checkpoints.kept_numbers import FORMAT, KEPT, read_kept_numbers
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.structures.kept import Kept


def write_kept(folder: Path, kept: Kept) -> None:
    """Write ``kept.json``: ``format``, ``layers`` and, for each kind, the units kept in each of these layers."""
    write_json(folder / KEPT, {"format": FORMAT, "layers": list(kept.layers), **_numbers(kept)})


def read_kept(folder: Path) -> Kept:
    """Read ``kept.json``, whichever version wrote it."""
    layers, numbers = read_kept_numbers(folder)
    units = {kind: [torch.tensor(row, dtype=torch.int64) for row in rows] for kind, rows in numbers.items()}
    return Kept(layers, units)


def digest_of_kept(kept: Kept) -> str:
    """A digest of the content; for one kind of units and no dropped layers, the same as in earlier versions."""
    numbers = _numbers(kept)
    if len(numbers) == 1 and kept.layers == tuple(range(len(kept.layers))):
        return digest_of(next(iter(numbers.values())))
    return digest_of({"layers": list(kept.layers), **numbers})


def _numbers(kept: Kept) -> dict[str, list[list[int]]]:
    return {kind: [row.tolist() for row in rows] for kind, rows in kept.units.items()}
