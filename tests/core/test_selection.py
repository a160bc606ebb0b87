import pytest
import torch

from hfprune_dist.core.selection import entries_of, top_units


def test_ties_are_broken_by_index():
    assert top_units(torch.ones(10, dtype=torch.float64), 4).tolist() == [0, 1, 2, 3]
    assert top_units(torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0]), 3).tolist() == [0, 1, 3]


def test_equal_parts_keep_equal_numbers():
    assert top_units(torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0]), 4, 2).tolist() == [0, 1, 4, 5]
    for none in (top_units(torch.ones(4), 0, 2), top_units(torch.ones(0), 0)):
        assert none.tolist() == [] and none.dtype == torch.int64


def test_entries_of_units_follow_one_another_in_every_part():
    units = torch.tensor([2, 0])
    assert entries_of(units, 3).tolist() == [6, 7, 8, 0, 1, 2]
    assert entries_of(units, 2, parts=2, units=3).tolist() == [4, 5, 0, 1, 10, 11, 6, 7]


@pytest.mark.parametrize(("count", "parts"), [(5, 1), (3, 2)])
def test_neither_more_than_there_are_nor_unequal_parts(count, parts):
    with pytest.raises(AssertionError, match="of 4 units"):
        top_units(torch.ones(4), count, parts)
