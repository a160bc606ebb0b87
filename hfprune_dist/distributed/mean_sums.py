"""Means of vectors over the windows of all ranks, with the same bits on any number of ranks."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.core.exact_sums import ExactSum
from hfprune_dist.core.wide import wide_dtype
from hfprune_dist.distributed.window_sums import WindowSums


class MeanSums(WindowSums[ExactSum, Tensor]):
    """The exact sum of some vectors, one for each token, on one rank."""

    def of_all_ranks(self) -> Tensor:
        """The sum, float64 [size]. Collective."""
        own = self._complete()
        self._world.all_reduce(own.total.integers())
        return own.value()

    def _add(self, _index: int, vectors_ND: Tensor) -> None:
        # The scale is of absolute values: terms may cancel in the first sum, and not in others.
        own = self._sums or self._at_scale_of(vectors_ND.abs().sum(dim=0, dtype=wide_dtype(vectors_ND.dtype)))
        own.add(vectors_ND.sum(dim=0, dtype=torch.float64))

    def _empty(self, first_D: Tensor) -> ExactSum:
        return ExactSum(float(first_D.max()), self._count, first_D.shape, self._world.device)
