"""Layers that a pass still has to work on, once earlier attempts have finished some of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from hfprune_dist.distributed.world import World


def unfinished(layers: Iterable[int], done: Callable[[], set[int]], world: World) -> list[int]:
    """Return those of some layers that aren't done yet, in the same order on every rank. Collective.

    Args:
        done: returns the numbers of the layers that are done. Only rank 0 calls it: it may set damaged files aside.
    """
    known = world.on_rank0(done)
    return [number for number in layers if number not in known]


def up_to_last(left: Sequence[int]) -> range:
    """Return the layers that windows must go through to reach all those that are left: none if none are."""
    return range(left[-1] + 1 if left else 0)
