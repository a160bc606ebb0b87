"""Whether more calibration windows would still change which units stay: two halves of them are compared."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

# Kept sets are compared at these shares of a layer's units: about what ratios of 10 to 30 % of a model leave.
SHARES_KEPT = (0.8, 0.65, 0.5)


def split_half_overlap(first: Iterable[Tensor], second: Iterable[Tensor], share: float) -> float:
    """Of the units that one half of the windows keeps, the share that the other keeps too, over all layers together.

    Args:
        first: sums over one half, float64 [units] of each layer.
        second: over the other.
        share: of a layer's units that stay.
    """
    kept = common = 0
    for first_U, second_U in zip(first, second, strict=True):
        width = max(1, round(share * len(first_U)))
        tops = (sums_U.topk(width).indices for sums_U in (first_U, second_U))
        common += int(torch.isin(*tops).sum())
        kept += width
    return common / kept
