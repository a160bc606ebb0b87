"""Layers that a pass still has to work on, and ranks that solve independent ones at the same time."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Generic, TypeVar

from hfprune_dist.distributed.world import World

Work = TypeVar("Work")


def unfinished(layers: Iterable[int], done: Callable[[], set[int]], world: World) -> list[int]:
    """Return those of some layers that earlier attempts haven't finished, in the same order on every rank. Collective.

    Args:
        done: returns the numbers of the layers that are done. Only rank 0 calls it: it may set damaged files aside.
    """
    known = world.on_rank0(done)
    return [number for number in layers if number not in known]


def up_to_last(left: Sequence[int]) -> range:
    """Return the layers that windows must go through to reach all those that are left: none if none are."""
    return range(left[-1] + 1 if left else 0)


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
