"""Cut tensors equal indexed ones, bit for bit."""

import pytest
import torch

from hfprune_dist.checkpoints.cut import BITS, Cut

KEPT = torch.tensor([0, 2, 3, 6])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.float8_e4m3fn])
@pytest.mark.parametrize("dimension", [0, 1])
def test_a_cut_keeps_all_bits(dtype, dimension):
    bits = torch.arange(56, dtype=torch.uint8).repeat_interleave(dtype.itemsize).view(BITS[dtype.itemsize]).view(7, 8)
    bits[2, 3] = -1 if dtype.itemsize > 1 else 255  # not a number
    cut = Cut(dimension, KEPT)
    got = cut.apply(bits.view(dtype))
    assert got.dtype == dtype
    assert got.is_contiguous()
    assert got.shape == cut.shape((7, 8))
    expected = bits[KEPT] if dimension == 0 else bits[:, KEPT]
    assert torch.equal(got.view(bits.dtype), expected)


def test_a_cut_takes_the_entries_of_a_bias():
    assert Cut(0, KEPT).apply(torch.arange(8.0)).tolist() == [0.0, 2.0, 3.0, 6.0]
