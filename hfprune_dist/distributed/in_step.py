"""Iteration in step over what each rank makes for itself, so that an error of one of them ends all ranks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TypeVar

from hfprune_dist.distributed.world import World

T = TypeVar("T")


def in_step(items: Iterator[T], world: World) -> Iterator[T]:
    """Yield this rank's items, e.g. the layers that it reads, each once all ranks have theirs; collective.

    An item is freed as soon as its user drops it: none is kept here.

    Args:
        items: as many on every rank, made without collectives.

    Raises:
        UserError, ClaimLostError: as ``World.work_apart``.
    """
    while box := world.make_apart(lambda: list(islice(items, 1))):
        yield box.pop()
