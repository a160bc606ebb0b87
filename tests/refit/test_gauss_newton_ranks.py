"""Gauss-Newton steps of all ranks together: what no sum holds is refused on all of them."""

import pytest
import torch
from worlds import Ranks

from hfprune_dist.core.gauss_newton import Biases, MlpWeights
from hfprune_dist.distributed.window_sums import UnusableActivationsError
from hfprune_dist.refit.gauss_newton_ranks import Reconstruction, Start

MICRO_BATCHES, TOKENS, HIDDEN, KEPT = 5, 6, 3, 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize(("place", "value"), [(0, float("nan")), (1, float("inf")), (2, float("nan")), (3, 1e35)])
def test_a_target_of_one_rank_that_no_sum_holds_ends_all_ranks(place, value, ranks):
    """The first micro-batch decides what is in proportion. Some ranks have no micro-batches."""
    generator = torch.Generator().manual_seed(place)
    inputs = [torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(MICRO_BATCHES)]
    targets = [torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(MICRO_BATCHES)]
    targets[place][-1, 0] = value
    rows_KC = tuple(torch.randn(KEPT, HIDDEN, generator=generator) for _ in range(2))
    start = Start(MlpWeights(rows_KC, torch.randn(HIDDEN, KEPT, generator=generator)), torch.eye(KEPT), TOKENS)

    def work(world):
        mine = range(world.rank, MICRO_BATCHES, world.size)
        reconstruction = Reconstruction(
            7,
            torch.float32,
            Biases(),
            {index: inputs[index] for index in mine},
            {index: targets[index] for index in mine},
            micro_batches=MICRO_BATCHES,
            more_iterations=1,
            world=world,
        )
        with pytest.raises(UnusableActivationsError, match=r"^activations of layer 7: "):
            reconstruction.improve(start, start)
        return world.all_gather(world.rank)

    assert Ranks(ranks).run(work) == [[*range(ranks)]] * ranks
