"""Agreement of two halves of the calibration windows: whether more windows would still change which units stay."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hfprune_dist.core.selection import top_units

# Shares of a layer's units at which kept sets are compared: about what stays at ratios of 10 to 30 % of a model.
SHARES_KEPT = (0.8, 0.65, 0.5)


def split_half_overlap(first: Iterable[Tensor], second: Iterable[Tensor], share: float) -> float:
    """Return the share of the units kept by one half of the windows that the other half keeps too, over all layers.

    Among equal sums, such as those of neurons that are never active, lower indices stay, as in pruning.

    Args:
        first: sums over one half, float64 [units] for each layer.
        second: sums over the other half.
        share: share of a layer's units that stay.
    """
    kept = common = 0
    for first_U, second_U in zip(first, second, strict=True):
        width = max(1, round(share * len(first_U)))
        tops = (top_units(sums_U, width) for sums_U in (first_U, second_U))
        common += int(torch.isin(*tops).sum())
        kept += width
    return common / kept
