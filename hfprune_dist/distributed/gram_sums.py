"""Gram matrices over the windows of all ranks: float32 products of a micro-batch, added up in float64.

There are two kinds of micro-batches: most are used for the fit, some are held out to choose its ridge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.distributed.float64_sum import Float64Sum
from hfprune_dist.distributed.world import World

# One micro-batch in this many is held out.
HOLD_OUT_EVERY = 8


@dataclass(frozen=True)
class Grams:
    """Mean of h h^T over tokens: float64, on the device, on every rank; h is a layer's activations, or other vectors.

    Attributes:
        fitted_DD: over the micro-batches that are fitted.
        held_out_DD: over those that are held out.
        held_out_share: the share of all tokens that is held out.
    """

    fitted_DD: Tensor
    held_out_DD: Tensor
    held_out_share: float

    def to(self, device: torch.device) -> Grams:
        """The same matrices on a device."""
        return Grams(self.fitted_DD.to(device), self.held_out_DD.to(device), self.held_out_share)

    def whole(self) -> Tensor:
        """The mean over all micro-batches, a new matrix that is as large as either of them."""
        return self.fitted_DD.lerp(self.held_out_DD, self.held_out_share)


class GramSums:
    """Sums of v v^T over fitted and over held-out micro-batches, on one rank.

    Args:
        number: of the layer whose activations are summed, for messages.
        size: length of a vector v.
        count: number of micro-batches of all ranks.
    """

    def __init__(self, number: int, size: int, count: int, world: World) -> None:
        self._fitted, self._held_out = (Float64Sum(number, (size, size), world) for _ in range(2))
        self._count = count

    def add(self, index: int, vectors_ND: Tensor) -> None:
        """Add a micro-batch's vectors [tokens, size]; there may be none."""
        if len(vectors_ND):
            (self._held_out if is_held_out(index, self._count) else self._fitted).add(gram_matrix(vectors_ND))

    def of_all_ranks(self, owner: int | None = None) -> tuple[Tensor, Tensor]:
        """Return both sums, float64 [size, size] each, as ``Float64Sum.of_all_ranks`` does."""
        return self._fitted.of_all_ranks(owner), self._held_out.of_all_ranks(owner)


def is_held_out(index: int, count: int) -> bool:
    """Whether the micro-batch ``index``, one of ``count``, is held out rather than fitted."""
    every = min(HOLD_OUT_EVERY, count)
    return count > 1 and index % every == every - 1


def windows_held_out(windows: int, micro_batch_size: int) -> list[bool]:
    """For each window, whether its micro-batch is held out rather than fitted."""
    batches = -(-windows // micro_batch_size)
    return [is_held_out(window // micro_batch_size, batches) for window in range(windows)]
