import pytest
import torch

from hfprune_dist.core.selection import entries_of, top_units, top_units_of_each


def test_ties_are_broken_by_index():
    assert top_units(torch.ones(10, dtype=torch.float64), 4).tolist() == [0, 1, 2, 3]
    scores = torch.tensor([1.0, 2.0, 1.0, 2.0, 1.0])
    assert top_units(scores, 3).tolist() == [0, 1, 3]


def test_equal_parts_keep_equal_numbers():
    scores = torch.tensor([9.0, 8.0, 7.0, 1.0, 3.0, 2.0])
    assert top_units_of_each(scores, 4, 2).tolist() == [0, 1, 4, 5]
    assert top_units_of_each(scores, 2, 1).tolist() == [0, 1]


def test_no_units_are_indices_too():
    none = top_units_of_each(torch.ones(4), 0, 2)
    assert none.tolist() == [] and none.dtype == torch.int64


def test_entries_of_units_follow_one_another_in_every_part():
    units = torch.tensor([2, 0])
    assert entries_of(units, 3).tolist() == [6, 7, 8, 0, 1, 2]
    assert entries_of(units, 2, parts=2, units=3).tolist() == [4, 5, 0, 1, 10, 11, 6, 7]


@pytest.mark.parametrize("count", [0, 5])
def test_neither_none_nor_more_than_there_are(count):
    with pytest.raises(AssertionError, match="of 4 units"):
        top_units(torch.ones(4), count)
