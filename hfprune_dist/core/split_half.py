"""Whether more calibration windows would still change which units stay: two halves of them are compared."""

from __future__ import annotations

from torch import Tensor

# Kept sets are compared at these shares of a layer's units: about what ratios of 10 to 30 % of a model leave.
SHARES_KEPT = (0.8, 0.65, 0.5)


def split_half_overlap(first_LU: Tensor, second_LU: Tensor, share: float) -> float:
    """Of the units that one half of the windows keeps, the share that the other keeps too; the mean over layers.

    Args:
        first_LU: sums over one half, float64 [num_layers, units].
        second_LU: over the other.
        share: of a layer's units that stay.
    """
    width = max(1, round(share * first_LU.shape[1]))
    kept = [
        first_LU.new_zeros(first_LU.shape).scatter_(1, sums_LU.topk(width, dim=1).indices, 1.0)
        for sums_LU in (first_LU, second_LU)
    ]
    return float((kept[0] * kept[1]).sum() / (width * first_LU.shape[0]))
