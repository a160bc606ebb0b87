import pytest
from worlds import Ranks

from hfprune_dist.distributed.unfinished import unfinished, up_to_last


@pytest.mark.parametrize("size", [1, 3])
def test_all_ranks_have_what_the_first_one_has_read(size):
    def left(world):
        done = (lambda: {4, 7, 9}) if world.is_first else pytest.fail
        return unfinished((1, 4, 5, 7), done, world)

    assert Ranks(size).run(left) == [[1, 5]] * size


def test_windows_go_no_further_than_the_last_layer_that_is_left():
    assert [*up_to_last([1, 3])] == [0, 1, 2, 3]
    assert [*up_to_last([0])] == [0]
    assert [*up_to_last([])] == []
