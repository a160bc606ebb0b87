"""Sums over the windows of all ranks that have the same bits on any number of them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hfprune_dist.core.exact_sums import ExactOverflowError
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError

Sums = TypeVar("Sums")
# What is added of a micro-batch.
Read = TypeVar("Read")


def unusable(number: int, error: ExactOverflowError) -> UserError:
    """What to tell of sums over a layer's activations that can't be made."""
    return UserError(f"activations of layer {number}: {error}; check the checkpoint's weights")


class WindowSums(ABC, Generic[Sums, Read]):
    """Exact sums of what is made of a layer's activations, on one rank; their scale is that of the first rank's first.

    Args:
        number: of the layer, for messages.
        size: of what decides the scale, a vector.
        count: micro-batches of all ranks.
    """

    def __init__(self, number: int, size: int, count: int, world: World) -> None:
        self._number = number
        self._size = size
        self._count = count
        self._world = world
        self._sums: Sums | None = None

    def add(self, index: int, read: Read) -> None:
        """Add what was read in a micro-batch, vectors [tokens, size]; the first time it is collective.

        Raises:
            UserError: where they are not finite, or out of all proportion.
        """
        try:
            self._add(index, read)
        except ExactOverflowError as error:
            raise unusable(self._number, error) from None

    def begin(self) -> None:
        """After the last ``add``: a rank without windows takes part in what is collective of the first one."""
        self._at_scale_of(torch.zeros(self._size))

    @abstractmethod
    def _add(self, index: int, read: Read) -> None:
        """``add``, whose sums may overflow."""

    @abstractmethod
    def _empty(self, first_D: Tensor) -> Sums:
        """Sums of nothing yet.

        Args:
            first_D: float64, on the device, of the first rank: what it has passed to ``_at_scale_of``.
        """

    def _at_scale_of(self, term_D: Tensor) -> Sums:
        """The sums; if there are none yet, at the scale of the first rank's first term [size], which is collective."""
        if self._sums is None:
            first_D = term_D.to("cpu", torch.float64, copy=True)  # others' terms stay
            self._world.broadcast_tensor(first_D, 0)
            self._sums = self._empty(first_D.to(self._world.device))
        return self._sums

    def _begun(self) -> Sums:
        assert self._sums is not None, "not begun"
        return self._sums
