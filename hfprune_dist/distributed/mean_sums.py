"""Means of vectors over the windows of all ranks, with the same bits on any number of them."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.core.exact_sums import ExactOverflowError, ExactSum
from hfprune_dist.distributed.gram_sums import unusable
from hfprune_dist.distributed.world import World


class MeanSums:
    """The exact sum of some vectors, one for each token, on one rank.

    Args:
        number: of the layer, for messages.
        size: of a vector.
        count: micro-batches of all ranks.
    """

    def __init__(self, number: int, size: int, count: int, world: World) -> None:
        self._number = number
        self._size = size
        self._count = count
        self._world = world
        self._sum: ExactSum | None = None

    def add(self, _index: int, vectors_ND: Tensor) -> None:
        """Add a micro-batch's vectors [tokens, size]; the first time it is collective.

        Raises:
            UserError: where they are not finite, or out of all proportion.
        """
        wide = torch.promote_types(vectors_ND.dtype, torch.float32)
        try:
            if self._sum is None:  # terms may cancel in the first sum, and not in others
                self._sum = self._empty(vectors_ND.abs().sum(dim=0, dtype=wide).max())
            self._sum.add(vectors_ND.sum(dim=0, dtype=torch.float64))
        except ExactOverflowError as error:
            raise unusable(self._number, error) from None

    def begin(self) -> None:
        """After the last ``add``: a rank without windows takes part in what is collective of the first one."""
        if self._sum is None:
            self._sum = self._empty(torch.zeros(()))

    def of_all_ranks(self) -> Tensor:
        """The sum, float64 [size]. Collective."""
        assert self._sum is not None, "not begun"
        self._world.add_up(self._sum.total)
        return self._sum.value()

    def _empty(self, largest: Tensor) -> ExactSum:
        """At the scale of the first rank's first micro-batch."""
        first = largest.double().cpu()
        self._world.broadcast_tensor(first, 0)
        return ExactSum(float(first), self._count, torch.Size([self._size]), self._world.device)
