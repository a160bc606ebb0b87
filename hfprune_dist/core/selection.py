"""Selection of the units that stay, and of their entries in tensors."""

from __future__ import annotations

import torch
from torch import Tensor


def top_units(scores_U: Tensor, count: int, parts: int = 1) -> Tensor:
    """Ascending int64 indices of the ``count`` highest scores, equally many from each part; the lower wins a tie."""
    assert 0 <= count <= len(scores_U), f"{count} of {len(scores_U)} units"
    assert count % parts == len(scores_U) % parts == 0, f"{count} of {len(scores_U)} units in {parts} parts"
    width = len(scores_U) // parts
    order_PN = scores_U.view(parts, width).sort(descending=True, stable=True, dim=1).indices
    starts_P1 = width * torch.arange(parts, device=order_PN.device)[:, None]
    return (order_PN[:, : count // parts].sort(dim=1).values + starts_P1).flatten()


def entries_of(units_K: Tensor, per_unit: int, parts: int = 1, units: int = 0) -> Tensor:
    """Return the indices of the entries that some units own, ``per_unit`` consecutive ones each, in the units' order.

    Args:
        parts: number of consecutive parts of the tensor, each with such entries of every unit.
        units: number of units in each part; needed if there are several parts.
    """
    entries_N = (units_K[:, None] * per_unit + torch.arange(per_unit, device=units_K.device)).flatten()
    return torch.cat([entries_N + part * units * per_unit for part in range(parts)]) if parts > 1 else entries_N
