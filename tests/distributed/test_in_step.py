"""Iteration in step: what each rank makes for itself, until one of them can't."""

import gc
import weakref

import pytest
from worlds import Ranks

from hfprune_dist.distributed.in_step import in_step
from hfprune_dist.errors import UserError


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("count", [0, 1, 4])
def test_every_rank_has_its_own_items(size, count):
    found = Ranks(size).run(lambda world: [*in_step(((world.rank, it) for it in range(count)), world)])
    assert found == [[(rank, it) for it in range(count)] for rank in range(size)]


@pytest.mark.parametrize("place", [0, 2])
def test_an_item_that_one_rank_can_not_make_ends_all_of_them_after_the_same_items(place):
    def items(rank):
        for it in range(4):
            if rank == 1 and it == place:
                raise UserError("not to be read")
            yield it

    def work(world):
        seen = []
        with pytest.raises(UserError, match="not to be read"):
            seen.extend(in_step(items(world.rank), world))
        return seen, world.all_gather(world.rank)

    assert Ranks(3).run(work) == [([*range(place)], [0, 1, 2])] * 3


def test_an_item_that_its_user_has_dropped_is_gone_before_the_next_one_is_made():
    class Layer:
        pass

    def layers():
        before = None
        for _ in range(3):
            gc.collect()
            assert before is None or before() is None
            layer = Layer()
            before = weakref.ref(layer)
            yield layer
            del layer

    def work(world):
        count = 0
        for layer in in_step(layers(), world):
            count += 1
            del layer
        return count

    assert Ranks(1).run(work) == [3]
