"""Gram matrices and sums of squares over the windows of all ranks, with the same bits on any number of ranks.

There are two kinds of micro-batches: most are used for the fit, some are held out to choose its ridge.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.exact_sums import ExactGram, ExactSquares
from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.distributed.window_sums import WindowSums
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


class GramSums(WindowSums[tuple[ExactGram, ExactGram], Tensor]):
    """Exact sums of Gram matrices over fitted and over held-out micro-batches, on one rank."""

    def of_all_ranks(self) -> tuple[Tensor, Tensor]:
        """The sums, float64 [size, size] each. Collective; this rank's own sums are gone afterwards."""
        left = [*self._complete()][::-1]
        self._sums = None  # only the list refers to them now, so each is freed once it has been added up
        return self._added_up(left.pop()), self._added_up(left.pop())

    def _add(self, index: int, vectors_ND: Tensor) -> None:
        term_DD = gram_matrix(vectors_ND.float())
        fitted, held_out = self._at_scale_of(term_DD.diagonal())
        (held_out if is_held_out(index, self._count) else fitted).add(term_DD)

    def _added_up(self, own: ExactGram) -> Tensor:
        self._world.all_reduce(own.total_P.integers())
        return own.value()

    def _empty(self, first_D: Tensor) -> tuple[ExactGram, ExactGram]:
        return ExactGram(first_D, self._count), ExactGram(first_D, self._count)


class ExpertGramSums(WindowSums[list[tuple[ExactGram, ExactGram]], Sequence[Tensor]]):
    """``GramSums`` for each expert of a layer, which is given some of a micro-batch's tokens, or none.

    Here too, scales come from a single micro-batch. Channels that it hardly shows are assumed to be as large as the
    mean over all experts' channels.

    Args:
        size: length of a vector.
    """

    def __init__(self, number: int, size: int, experts: int, count: int, world: World) -> None:
        super().__init__(number, experts * size, count, world)
        self._experts = experts

    def of_all_ranks(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield each expert's sums, float64 [size, size] each; 0 if they are too small for the scale. Collective; this
        rank's own sums are released on the way.
        """
        left = [it for of_expert in self._complete() for it in of_expert][::-1]
        self._sums = None  # only the list refers to them now, so each is freed once it has been added up
        while left:
            yield self._added_up(left.pop()), self._added_up(left.pop())

    def _add(self, index: int, parts: Sequence[Tensor]) -> None:
        sums = self._sums or self._at_scale_of(torch.cat([part_ND.square().sum(dim=0) for part_ND in parts]))
        for part_ND, (fitted, held_out) in zip(parts, sums, strict=True):
            if len(part_ND):
                (held_out if is_held_out(index, self._count) else fitted).add(gram_matrix(part_ND))

    def _added_up(self, own: ExactGram) -> Tensor:
        self._world.all_reduce(own.total_P.integers())
        value_DD = own.value()
        return value_DD if own.is_resolved else value_DD.zero_()

    def _empty(self, first_D: Tensor) -> list[tuple[ExactGram, ExactGram]]:
        scales = first_D.maximum(first_D.mean()).chunk(self._experts)
        return [(ExactGram(it, self._count), ExactGram(it, self._count)) for it in scales]


class SquareSums(WindowSums[ExactSquares, Tensor]):
    """Exact sums of squares, channel by channel, on one rank."""

    def of_all_ranks(self) -> Tensor:
        """The sums, float64 [size], on the device, once they ``agree_on_scale``; collective."""
        sums = self._complete()
        self._world.all_reduce(sums.total_D)
        return sums.value()

    def _add(self, _index: int, vectors_ND: Tensor) -> None:
        term_D = vectors_ND.double().square().sum(dim=0)
        self._at_scale_of(term_D).add(term_D)

    def _empty(self, first_D: Tensor) -> ExactSquares:
        return ExactSquares(first_D, self._count)


def is_held_out(index: int, count: int) -> bool:
    """Whether the micro-batch ``index``, one of ``count``, is held out rather than fitted."""
    every = min(HOLD_OUT_EVERY, count)
    return count > 1 and index % every == every - 1


def windows_held_out(windows: int, micro_batch_size: int) -> list[bool]:
    """For each window, whether its micro-batch is held out rather than fitted."""
    batches = -(-windows // micro_batch_size)
    return [is_held_out(window // micro_batch_size, batches) for window in range(windows)]
