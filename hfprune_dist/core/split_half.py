"""Whether more calibration windows would still change which neurons stay: two halves of them are compared."""

from __future__ import annotations

from torch import Tensor

# Kept sets are compared at these shares of a layer's neurons: about what ratios of 10 to 30 % of a model leave.
SHARES_KEPT = (0.8, 0.65, 0.5)


def split_half_overlap(first_LD: Tensor, second_LD: Tensor, share: float) -> float:
    """Of the neurons that one half of the windows keeps, the share that the other keeps too; the mean over layers.

    Args:
        first_LD: sums over one half, float64 [num_layers, intermediate_size].
        second_LD: over the other.
        share: of a layer's neurons that stay.
    """
    width = max(1, round(share * first_LD.shape[1]))
    kept = [
        first_LD.new_zeros(first_LD.shape).scatter_(1, sums_LD.topk(width, dim=1).indices, 1.0)
        for sums_LD in (first_LD, second_LD)
    ]
    return float((kept[0] * kept[1]).sum() / (width * first_LD.shape[0]))
