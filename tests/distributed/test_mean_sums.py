"""Means over windows of all ranks: exact in any order, and refused where exactness is impossible."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import SoloWorld
from worlds import Ranks

from hfprune_dist.distributed.mean_sums import MeanSums
from hfprune_dist.errors import UserError


def total_of(batches, ranks):
    """Return the sum on every rank over micro-batches that are dealt out."""

    def work(world):
        sums = MeanSums(3, batches[0].shape[1], len(batches), world)
        for index in range(world.rank, len(batches), world.size):
            sums.add(index, batches[index])
        sums.agree_on_scale()
        return sums.of_all_ranks()

    return Ranks(ranks).run(work)


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    count=st.integers(1, 5),
    ranks=st.integers(2, 6),
    dtype=st.sampled_from([torch.bfloat16, torch.float32]),
    seed=st.integers(0, 99),
)
def test_sums_have_the_same_bits_on_any_number_of_ranks_also_where_terms_cancel(count, ranks, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(7, 4, generator=generator) * 10**index).to(dtype) for index in range(count)]
    batches[0][3:] = -batches[0][:4]  # a first sum in which most terms cancel
    (alone,) = total_of(batches, 1)
    assert all(torch.equal(it, alone) for it in total_of(batches, ranks))
    torch.testing.assert_close(alone, torch.cat(batches).double().sum(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize(("place", "value"), [(0, float("nan")), (0, float("inf")), (1, float("nan")), (2, 1e30)])
def test_what_is_not_finite_or_out_of_all_proportion_names_the_layer_on_all_ranks(place, value, ranks):
    """The first micro-batch decides what is in proportion. Some ranks have no micro-batches."""
    batches = [torch.ones(5, 2) for _ in range(4)]
    batches[place][2, 1] = value

    def work(world):
        sums = MeanSums(3, 2, len(batches), world)
        for index in range(world.rank, len(batches), world.size):
            sums.add(index, batches[index])
        sums.agree_on_scale()
        with pytest.raises(UserError, match=r"activations of layer 3: .*check the checkpoint's weights"):
            sums.of_all_ranks()
        return world.all_gather(world.rank)

    assert Ranks(ranks).run(work) == [[*range(ranks)]] * ranks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_rank_without_windows_says_the_same_of_what_is_not_finite(value):
    class Second(SoloWorld):
        def broadcast_tensor(self, tensor, source):
            tensor.fill_(value)

    sums = MeanSums(3, 2, 1, Second(rank=1, size=2))
    sums.agree_on_scale()
    with pytest.raises(UserError, match=r"activations of layer 3: .*check the checkpoint's weights"):
        sums.of_all_ranks()
