"""Which units stay, and which entries of tensors are theirs."""

from __future__ import annotations

import torch
from torch import Tensor


def top_units(scores_U: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` highest scores, ascending (int64). Of equal scores, the lower index stays."""
    assert 0 < count <= scores_U.numel(), f"{count} of {scores_U.numel()} units"
    order = scores_U.sort(descending=True, stable=True).indices
    return order[:count].sort().values


def entries_of(units_K: Tensor, per_unit: int) -> Tensor:
    """Indices of the entries that some units own where each owns ``per_unit`` consecutive ones: ascending, as units."""
    return (units_K[:, None] * per_unit + torch.arange(per_unit, device=units_K.device)).flatten()
