"""Iteration in step over what each rank makes for itself, so that an error of one of them ends all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import TypeVar

from hfprune_dist.distributed.world import World

T = TypeVar("T")


def in_step(items: Iterator[T], world: World) -> Iterator[T]:
    """Yield this rank's items, e.g. the layers that it reads, each once all ranks have theirs; collective.

    An item may be freed before the next one is made.

    Args:
        items: as many on every rank, none of them None, made without collectives.

    Raises:
        UserError, ClaimLostError: as ``World.work_apart``.
    """
    make = partial(next, items, None)
    while (item := world.make_apart(make)) is not None:
        yield item
        del item  # before the next one, which is as large
