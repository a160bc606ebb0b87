"""Solving independent layers, a different one on each rank at the same time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

from hfprune_dist.distributed.world import World

Work = TypeVar("Work")


class Turns(Generic[Work]):
    """Ranks take turns: out of as many layers as there are ranks, each solves one, all at the same time.

    Args:
        layers: the numbers of the layers to solve, ascending.
        solve: what a rank does with its layer; it saves the result.
    """

    def __init__(self, layers: Sequence[int], world: World, solve: Callable[[Work], None]) -> None:
        self._places = {layer: place for place, layer in enumerate(layers)}
        self._world = world
        self._solve = solve
        self._waiting: Work | None = None

    def owner(self, layer: int) -> int:
        """Return the rank that solves a layer."""
        return self._places[layer] % self._world.size

    def add(self, layer: int, work: Work | None) -> None:
        """Add the next layer; once every rank has one, all of them solve theirs. Collective.

        Args:
            work: of the rank whose turn it is; None on the others.
        """
        if work is not None:
            self._waiting = work
        del work
        place = self._places[layer] + 1
        if place % self._world.size == 0 or place == len(self._places):
            self.finish()

    def finish(self) -> None:
        """Solve the layers that wait; collective, so that no rank leaves while another one still saves."""
        if self._waiting is not None:
            self._solve(self._waiting)
            self._waiting = None
        self._world.barrier()
