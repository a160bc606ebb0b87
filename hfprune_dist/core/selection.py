"""Which neurons stay."""

from __future__ import annotations

from torch import Tensor


def top_neurons(scores_D: Tensor, width: int) -> Tensor:
    """Indices of the ``width`` highest scores, ascending (int64). Of equal scores, the lower index stays."""
    assert 0 < width <= scores_D.numel(), f"width {width} of {scores_D.numel()} neurons"
    order = scores_D.sort(descending=True, stable=True).indices
    return order[:width].sort().values
