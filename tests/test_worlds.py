"""The worlds that other tests rely on: ranks that are threads."""

import pytest
import torch
from worlds import DivergedError, Ranks


@pytest.mark.parametrize(
    ("odd_one", "message"),
    [
        (lambda world: world.all_gather(0), "rank 1 is in its collective 1, all_gather"),
        (
            lambda world: world.all_reduce(torch.zeros(2)),
            r"rank 1 is in its collective 1, all_reduce torch.float32 \[2\]",
        ),
        (lambda world: None, "rank 1 has ended after 1"),
    ],
)
def test_ranks_that_diverge_are_named(odd_one, message):
    def work(world):
        world.all_gather(0)
        if world.rank == 1:
            odd_one(world)
        else:
            world.broadcast(0)

    with pytest.raises(DivergedError, match=message) as raised:
        Ranks(3).run(work)
    assert "is in its collective 1, broadcast from 0" in str(raised.value)
