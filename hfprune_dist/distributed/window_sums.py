"""Sums over the windows of all ranks, with the same bits on any number of ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Generic, TypeVar

import torch
from torch import Tensor

from hfprune_dist.core.exact_sums import ExactOverflowError
from hfprune_dist.core.gram import UnresolvedError
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError

Sums = TypeVar("Sums")
# What is added for a micro-batch.
Read = TypeVar("Read")


class UnusableActivationsError(UserError):
    """Sums over a layer's activations can't be made, or say too little to fit anything to them."""


@contextmanager
def explaining(number: int) -> Iterator[None]:
    """Name a layer where sums over its activations can't be made, or say too little to fit anything to them.

    Raises:
        UnusableActivationsError: instead of the errors that say so.
    """
    try:
        yield
    except (ExactOverflowError, UnresolvedError) as error:
        message = f"activations of layer {number}: {error}; check the checkpoint's weights"
        raise UnusableActivationsError(message) from None


class WindowSums(ABC, Generic[Sums, Read]):
    """Exact sums of terms made from a layer's activations, on one rank; the first rank's first term sets their scale.

    Args:
        number: the layer's, for messages.
        size: length of the vector that sets the scale.
        count: number of micro-batches of all ranks.
    """

    def __init__(self, number: int, size: int, count: int, world: World) -> None:
        self._number = number
        self._size = size
        self._count = count
        self._world = world
        self._sums: Sums | None = None
        self._refusal: UnusableActivationsError | None = None

    def add(self, index: int, read: Read) -> None:
        """Add what was read in a micro-batch, vectors [tokens, size]; the first call is collective.

        What can't be added is refused once all ranks are asked for their sums, so that none waits for one that is gone.
        """
        self._unless_refused(lambda: self._add(index, read))

    def agree_on_scale(self) -> None:
        """Call after the last ``add``, so that ranks without windows take part in the first one's collective, too."""
        self._unless_refused(lambda: self._at_scale_of(torch.zeros(self._size)))

    def _unless_refused(self, action: Callable[[], object]) -> None:
        if self._refusal is None:
            try:
                with explaining(self._number):
                    action()
            except UnusableActivationsError as error:
                self._refusal = error

    @abstractmethod
    def _add(self, index: int, read: Read) -> None:
        """Do what ``add`` does; raises ``ExactOverflowError`` if the sums overflow."""

    @abstractmethod
    def _empty(self, first_D: Tensor) -> Sums:
        """Return sums to which nothing has been added yet.

        Args:
            first_D: what the first rank has passed to ``_at_scale_of``, float64, on the device.
        """

    def _at_scale_of(self, term_D: Tensor) -> Sums:
        """Return the sums. If there are none yet, make them at the scale of rank 0's first term [size]; collective."""
        if self._sums is None:
            first_D = term_D.to("cpu", torch.float64, copy=True)  # leaves other ranks' terms as they are
            self._world.broadcast_tensor(first_D, 0)
            self._sums = self._empty(first_D.to(self._world.device))
        return self._sums

    def _complete(self) -> Sums:
        """Return this rank's sums, once every rank has added all that it has; collective.

        Raises:
            UnusableActivationsError: on all ranks, if terms of any of them are not finite, or out of all proportion.
        """
        self._world.work_apart(self._require_usable)
        assert self._sums is not None, "no scale yet"
        return self._sums

    def _require_usable(self) -> None:
        if self._refusal is not None:
            raise self._refusal
