"""Selection of the units that stay, and of their entries in tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def top_units(scores_U: Tensor, count: int) -> Tensor:
    """Return the ascending int64 indices of the ``count`` highest scores. Among equal scores, lower indices win."""
    assert 0 < count <= scores_U.numel(), f"{count} of {scores_U.numel()} units"
    order = scores_U.sort(descending=True, stable=True).indices
    return order[:count].sort().values


def top_units_of_each(scores_U: Tensor, count: int, parts: int) -> Tensor:
    """Return ascending int64 indices of ``count`` units: the same number of highest scores from each equal part."""
    assert count % parts == len(scores_U) % parts == 0, f"{count} of {len(scores_U)} units in {parts} parts"
    if not count:
        return torch.zeros(0, dtype=torch.int64)
    width = len(scores_U) // parts
    kept = [top_units(part_N, count // parts) + width * it for it, part_N in enumerate(scores_U.split(width))]
    return torch.cat(kept)


def entries_of(units_K: Tensor, per_unit: int, parts: int = 1, units: int = 0) -> Tensor:
    """Return the indices of the entries that some units own, ``per_unit`` consecutive ones each, in the units' order.

    Args:
        parts: number of consecutive parts of the tensor, each with such entries of every unit.
        units: number of units in each part; needed if there are several parts.
    """
    entries_N = (units_K[:, None] * per_unit + torch.arange(per_unit, device=units_K.device)).flatten()
    return torch.cat([entries_N + part * units * per_unit for part in range(parts)]) if parts > 1 else entries_N
