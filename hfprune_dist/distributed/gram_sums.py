"""Gram matrices and sums of squares over the windows of all ranks, with the same bits on any number of them.

Micro-batches are of two kinds: most are fitted, some are held out to choose how much to trust the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.exact_sums import ExactGram, ExactOverflowError, ExactSquares
from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError

# Of so many micro-batches one is held out.
HOLD_OUT_EVERY = 8


@dataclass(frozen=True)
class Grams:
    """Mean of h h^T over tokens: float64, on the device, on every rank; h a layer's activations, or what else is asked.

    Attributes:
        fitted_DD: over the micro-batches that are fitted.
        held_out_DD: over those that are kept apart.
        held_out_share: of all tokens.
    """

    fitted_DD: Tensor
    held_out_DD: Tensor
    held_out_share: float

    def whole(self) -> Tensor:
        """Over all micro-batches, as large as each of both."""
        return self.fitted_DD.lerp(self.held_out_DD, self.held_out_share)


class GramSums:
    """Exact sums of Gram matrices over fitted and over held-out micro-batches, on one rank.

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
        self._sums: tuple[ExactGram, ExactGram] | None = None

    def add(self, index: int, vectors_ND: Tensor) -> None:
        """Add a micro-batch's vectors [tokens, size]; the first time it is collective."""
        term_DD = gram_matrix(vectors_ND.float())
        fitted, held_out = self._sums = self._sums or self._empty(term_DD.diagonal())
        try:
            (held_out if is_held_out(index, self._count) else fitted).add(term_DD)
        except ExactOverflowError as error:
            raise unusable(self._number, error) from None

    def begin(self) -> None:
        """After the last ``add``: a rank without windows takes part in what is collective of the first one."""
        self._sums = self._sums or self._empty(torch.zeros(self._size))

    def of_all_ranks(self) -> tuple[Tensor, Tensor]:
        """The sums, float64 [size, size] each. Collective; what this rank added is gone afterwards."""
        assert self._sums is not None, "not begun"
        fitted, held_out = self._sums
        self._sums = None
        return self._added_up(fitted), self._added_up(held_out)

    def _added_up(self, own: ExactGram) -> Tensor:
        self._world.add_up(own.total_DD)
        return own.value()

    def _empty(self, diagonal_D: Tensor) -> tuple[ExactGram, ExactGram]:
        """At the scale of the first rank's first term."""
        first_D = _of_first_rank(diagonal_D, self._world)
        return ExactGram(first_D, self._count), ExactGram(first_D, self._count)


class SquareSums:
    """Exact sums of squares over the windows of all ranks, channel by channel, on one rank.

    Args:
        number: of the layer, for messages.
        size: channels of a vector.
        count: micro-batches of all ranks.
    """

    def __init__(self, number: int, size: int, count: int, world: World) -> None:
        self._number = number
        self._size = size
        self._count = count
        self._world = world
        self._sums: ExactSquares | None = None

    def add(self, vectors_ND: Tensor) -> None:
        """Add a micro-batch's vectors [tokens, size]; the first time it is collective."""
        term_D = vectors_ND.double().square().sum(dim=0)
        self._sums = self._sums or self._empty(term_D)
        try:
            self._sums.add(term_D)
        except ExactOverflowError as error:
            raise unusable(self._number, error) from None

    def begin(self) -> None:
        """After the last ``add``: a rank without windows takes part in what is collective of the first one."""
        self._sums = self._sums or self._empty(torch.zeros(self._size))

    def of_all_ranks(self) -> Tensor:
        """The sums, float64 [size], on the device, once begun; collective."""
        assert self._sums is not None, "not begun"
        self._world.add_up(self._sums.total_D)
        return self._sums.value()

    def _empty(self, term_D: Tensor) -> ExactSquares:
        """At the scale of the first rank's first term."""
        return ExactSquares(_of_first_rank(term_D, self._world), self._count)


def _of_first_rank(term_D: Tensor, world: World) -> Tensor:
    first_D = term_D.to("cpu", torch.float64, copy=True)  # others' terms stay
    world.broadcast_tensor(first_D, 0)
    return first_D.to(world.device)


def unusable(number: int, error: ExactOverflowError) -> UserError:
    """What to tell of sums over a layer's activations that can't be made."""
    return UserError(f"activations of layer {number}: {error}; check the checkpoint's weights")


def is_held_out(index: int, count: int) -> bool:
    """Whether a micro-batch, one of ``count``, is kept apart from those that are fitted."""
    every = min(HOLD_OUT_EVERY, count)
    return count > 1 and index % every == every - 1
