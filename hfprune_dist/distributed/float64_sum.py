"""Sums over the micro-batches of all ranks, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hfprune_dist.core.gram import UnresolvedError
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError


class UnusableActivationsError(UserError):
    """A layer's activations are NaN or infinite, or too many of them are rounding errors to fit anything to them.

    Args:
        number: the layer's.
        problem: what is wrong with its activations.
    """

    def __init__(self, number: int, problem: object) -> None:
        super().__init__(f"activations of layer {number}: {problem}; check the checkpoint's weights")


@contextmanager
def explaining(number: int) -> Iterator[None]:
    """Name a layer whose Gram matrices are mostly rounding errors.

    Raises:
        UnusableActivationsError: instead of ``UnresolvedError``.
    """
    try:
        yield
    except UnresolvedError as error:
        raise UnusableActivationsError(number, error) from None


class Float64Sum:
    """A sum that each rank adds up over its own micro-batches, and that is then added up over all ranks, once.

    It has the same bits whenever the number of ranks is the same; with another number, it differs by rounding. Where a
    term is NaN or infinite, so is the sum.

    Args:
        number: of the layer whose activations are summed, for messages.
    """

    def __init__(self, number: int, shape: Sequence[int], world: World) -> None:
        self._number = number
        self._world = world
        self._sum = torch.zeros(shape, dtype=torch.float64, device=world.device)

    def add(self, term: Tensor) -> None:
        """Add a micro-batch's term, of any dtype."""
        self._sum += term

    def of_all_ranks(self, owner: int | None = None) -> Tensor:
        """Return the sum, float64, on the device; collective, and nothing can be added afterwards.

        Args:
            owner: the only rank that needs it; on others, what is returned means nothing. None if all do.

        Raises:
            UnusableActivationsError: on each rank that needs it, if it is NaN or infinite.
        """
        if owner is None:
            self._world.all_reduce(self._sum)
        elif self._world.size > 1:
            self._world.reduce(self._sum, owner)
        if owner in (None, self._world.rank) and not self._sum.sum().isfinite():
            raise UnusableActivationsError(self._number, "values are NaN or infinite")
        return self._sum
