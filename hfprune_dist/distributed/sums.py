"""Sums over the micro-batches of all ranks, in float64; Gram matrices for fits that hold micro-batches out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.gram import UnresolvedError, add_gram, mirrored
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError

# One micro-batch in this many is held out from fits, to choose their ridge.
HOLD_OUT_EVERY = 8


def is_held_out(index: int, count: int) -> bool:
    """Whether the micro-batch ``index``, one of ``count``, is held out rather than fitted."""
    every = min(HOLD_OUT_EVERY, count)
    return count > 1 and index % every == every - 1


def micro_batches_of(windows: int, size: int, merged: int = 1) -> list[list[int]]:
    """The numbers of the windows in each micro-batch. Up to ``merged`` of them become one, all fitted or all held out,
    but for a few at the end, which stay as they are: ``is_held_out`` says of each what it says of its parts.
    """
    parts = [list(range(start, min(start + size, windows))) for start in range(0, windows, size)]
    rounds = len(parts) // HOLD_OUT_EVERY if merged > 1 else 0
    found = []
    for first in range(0, rounds, merged):
        last = min(first + merged, rounds)
        for place in range(HOLD_OUT_EVERY):
            alike = parts[first * HOLD_OUT_EVERY + place : last * HOLD_OUT_EVERY : HOLD_OUT_EVERY]
            found.append([window for part in alike for window in part])
    return found + parts[rounds * HOLD_OUT_EVERY :]


def windows_held_out(windows: int, micro_batch_size: int) -> list[bool]:
    """For each window, whether its micro-batch is held out rather than fitted."""
    batches = -(-windows // micro_batch_size)
    return [is_held_out(window // micro_batch_size, batches) for window in range(windows)]


def unusable_activations(number: int, problem: object) -> UserError:
    """The error that a layer's activations are NaN, infinite, or mostly rounding errors."""
    return UserError(f"activations of layer {number}: {problem}; check the checkpoint's weights")


@contextmanager
def naming_layer(number: int) -> Iterator[None]:
    """Within the context, turn an ``UnresolvedError`` into a ``UserError`` that names the layer."""
    try:
        yield
    except UnresolvedError as error:
        raise unusable_activations(number, error) from None


class Float64Sum:
    """A sum that each rank adds up over its own micro-batches, and that is then added up over all ranks, once.

    It has the same bits whenever the number of ranks is the same; with another number, it differs by rounding. Where a
    term is NaN or infinite, so is the sum.

    Args:
        number: of the layer whose activations are summed, for messages.
        is_gram: whether all terms are added by ``add_gram``; a rank may have none.
    """

    def __init__(self, number: int, shape: Sequence[int], world: World, *, is_gram: bool = False) -> None:
        self._number = number
        self._world = world
        self._is_gram = is_gram
        self._sum = torch.zeros(tuple(shape), dtype=torch.float64, device=world.device)

    def add(self, term: Tensor) -> None:
        """Add a micro-batch's term, of any dtype."""
        self._sum += term

    def add_gram(self, vectors_ND: Tensor) -> None:
        """Add the Gram matrix of a micro-batch's vectors."""
        add_gram(self._sum, vectors_ND)

    @classmethod
    def of_all_ranks(cls, sums: Sequence[Float64Sum], owner: int | None = None) -> list[Tensor]:
        """Return sums of one layer, float64, on the device; collective, and nothing can be added afterwards.

        Args:
            owner: the only rank that needs them; on others, what is returned means nothing. None if all do.

        Raises:
            UserError: on each rank that needs them, if one is NaN or infinite.
        """
        first, totals = sums[0], [each._sum for each in sums]
        for total in totals:
            if owner is None:
                first._world.all_reduce(total)
            elif first._world.size > 1:
                first._world.reduce(total, owner)
        is_needed = owner in (None, first._world.rank)
        if is_needed and not torch.stack([total.sum() for total in totals]).isfinite().all():  # for a GPU, one wait
            raise unusable_activations(first._number, "values are NaN or infinite")
        return [mirrored(each._sum) if each._is_gram else each._sum for each in sums]


@dataclass(frozen=True)
class Grams:
    """Sums of h h^T over the tokens of micro-batches that are fitted, and of those that are held out, zeros if there is
    only one; float64, on the device; h is a layer's activations, or other vectors.
    """

    fitted_DD: Tensor
    held_out_DD: Tensor

    def whole(self) -> Tensor:
        """The sum over all micro-batches, a new matrix."""
        return self.fitted_DD + self.held_out_DD


class GramSums:
    """Sums of v v^T [size, size] over fitted and over held-out micro-batches, of so many on all ranks together: float32
    products of one, added up in float64; ``number`` is the layer's, as for ``Float64Sum``.
    """

    def __init__(self, number: int, size: int, micro_batches: int, world: World) -> None:
        self._fitted, self._held_out = (Float64Sum(number, (size, size), world, is_gram=True) for _ in range(2))
        self._micro_batches = micro_batches

    def add(self, index: int, vectors_ND: Tensor) -> None:
        """Add a micro-batch's vectors [tokens, size]; there may be none."""
        if len(vectors_ND):
            (self._held_out if is_held_out(index, self._micro_batches) else self._fitted).add_gram(vectors_ND)

    @classmethod
    def of_all_ranks(cls, sums: Sequence[GramSums], owner: int | None = None) -> list[Grams]:
        """The sums over all ranks; collective, see ``Float64Sum.of_all_ranks``."""
        totals = Float64Sum.of_all_ranks([part for each in sums for part in (each._fitted, each._held_out)], owner)
        return [Grams(*pair) for pair in zip(totals[::2], totals[1::2], strict=True)]
