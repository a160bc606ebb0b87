"""ZeRO-3 over two real ranks, for many families in one pair of processes."""

import torch
from forks import on_ranks
from ranks import SoloWorld


def assert_two_ranks_have_the_bits_of_one(checkpoints, scorer_of, folder, *, shards):
    """Check that two ranks, each scoring its own windows, give the bits of one rank that scores all windows in turn.

    ``checkpoints``: by name. ``scorer_of``: (checkpoint, world) -> its scorer. ``shards``: the windows of each rank.
    """

    def sums_of(name, world, *ranks):
        """Return the sums of each of some ranks."""
        scorer = scorer_of(checkpoints[name], world)
        sums = [scorer.score([shards[rank]]) for rank in ranks]
        scorer.release()
        return [{kind: it.exact["entropy"] for kind, it in of_rank.kinds.items()} for of_rank in sums]

    def act(world):
        from hfprune_dist.distributed.zero3 import init_deepspeed

        init_deepspeed(world)
        torch.save({name: sums_of(name, world, world.rank) for name in checkpoints}, folder / f"{world.rank}.pt")

    assert on_ranks(2, act).codes == [0, 0]
    found = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    for name in checkpoints:
        for rank, expected in enumerate(sums_of(name, SoloWorld(), 0, 1)):
            (sums,) = found[rank][name]
            assert all(torch.equal(sums[kind], it) for kind, it in expected.items()), (rank, name)
