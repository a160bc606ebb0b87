"""Gauss-Newton steps of all ranks together: what is not finite is refused."""

import pytest
import torch
from worlds import Ranks

from hfprune_dist.core.gauss_newton import Biases, MlpWeights
from hfprune_dist.errors import UserError
from hfprune_dist.refit.gauss_newton_ranks import Reconstruction, Start

MICRO_BATCHES, TOKENS, HIDDEN, KEPT = 5, 6, 3, 4


@pytest.mark.parametrize("ranks", [1, 7])
@pytest.mark.parametrize(("place", "value"), [(0, float("nan")), (1, float("inf"))])
def test_a_target_that_is_not_finite_names_the_layer(place, value, ranks):
    """Some ranks have no micro-batches."""
    generator = torch.Generator().manual_seed(place)
    inputs = [torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(MICRO_BATCHES)]
    targets = [torch.randn(TOKENS, HIDDEN, generator=generator) for _ in range(MICRO_BATCHES)]
    targets[place][-1, 0] = value
    rows_KC = tuple(torch.randn(KEPT, HIDDEN, generator=generator) for _ in range(2))
    start = Start(MlpWeights(rows_KC, torch.randn(HIDDEN, KEPT, generator=generator)), torch.eye(KEPT))

    def work(world):
        mine = range(world.rank, MICRO_BATCHES, world.size)
        reconstruction = Reconstruction(
            7,
            torch.float32,
            Biases(),
            {index: inputs[index] for index in mine},
            {index: targets[index] for index in mine},
            micro_batches=MICRO_BATCHES,
            world=world,
        )
        reconstruction.improve(start, start, 1, 1)

    with pytest.raises(UserError, match=r"^activations of layer 7: "):
        Ranks(ranks).run(work)
