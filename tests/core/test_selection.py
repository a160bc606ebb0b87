import torch

from hfprune_dist.core.selection import top_units


def test_keeps_the_highest_in_ascending_order():
    scores = torch.tensor([0.1, 5.0, 3.0, 0.2, 4.0], dtype=torch.float64)
    assert top_units(scores, 3).tolist() == [1, 2, 4]


def test_ties_are_broken_by_index():
    assert top_units(torch.ones(10, dtype=torch.float64), 4).tolist() == [0, 1, 2, 3]
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert top_units(scores, 3).tolist() == [0, 1, 3]


def test_smaller_widths_keep_subsets():
    scores = torch.randn(100, generator=torch.Generator().manual_seed(0)).abs()
    previous = set(range(100))
    for width in (80, 50, 20, 1):
        kept = set(top_units(scores, width).tolist())
        assert len(kept) == width and kept <= previous
        previous = kept
