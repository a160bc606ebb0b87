"""The worlds that other tests rely on: ranks that are threads."""

import pytest
import torch
from worlds import Death, DivergedError, Ranks


def test_collectives_bring_what_real_ones_would():
    def work(world):
        tensor = torch.tensor([world.rank, 1])
        world.all_reduce(tensor)
        mine = torch.full((2,), float(world.rank))
        world.broadcast_tensor(mine, 2)
        told = world.on_rank0(lambda: f"told by {world.rank}")
        world.barrier()
        return (
            world.all_gather(world.rank),
            world.broadcast({"of": world.rank}, 1),
            tensor.tolist(),
            mine.tolist(),
            told,
        )

    ranks = Ranks(3)
    assert ranks.run(work) == [([0, 1, 2], {"of": 1}, [3, 3], [2.0, 2.0], "told by 0")] * 3
    assert ranks.logs[0] == ranks.logs[1] == ranks.logs[2]
    assert ranks.counts(1)["all_reduce torch.int64 [2]"] == 1


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


def test_a_rank_dies_before_the_collective_that_was_chosen():
    done = []

    def work(world):
        for number in range(3):
            world.all_gather(number)
            done.append((world.rank, number))

    with pytest.raises(Death, match="rank 1 before its collective 2"):
        Ranks(2, deaths={1: 2}).run(work)
    assert sorted(done) == [(0, 0), (0, 1), (1, 0), (1, 1)]
