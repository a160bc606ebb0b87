import torch

from hfprune_dist.core.split_half import split_half_overlap


def test_the_same_order_overlaps_fully_and_the_opposite_one_as_little_as_it_can():
    scores = torch.rand(3, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert split_half_overlap(scores, 3 * scores, 0.5) == 1.0
    assert split_half_overlap(scores, -scores, 0.5) == 0.0
    assert abs(split_half_overlap(scores, -scores, 0.8) - 0.75) < 1e-12


def test_it_is_the_mean_over_layers():
    scores = torch.arange(8.0, dtype=torch.float64).repeat(2, 1)
    other = scores.clone()
    other[1] = -other[1]
    assert split_half_overlap(scores, other, 0.5) == 0.5


def test_among_equal_sums_both_halves_keep_the_same_units():
    silent = torch.zeros(1, 20, dtype=torch.float64)
    other = silent.clone()
    other[0, 3] = 1.0
    assert [split_half_overlap(silent, other, share) for share in (0.8, 0.65, 0.5)] == [1.0, 1.0, 1.0]
