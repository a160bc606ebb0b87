"""How long recovery trains, how fast, and how ranks share its rows."""

import re
from fractions import Fraction
from math import ceil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.errors import UserError


@given(hundredths=st.integers(1, 1000), steps_per_epoch=st.integers(1, 10_000))
@example(110, 10)
def test_epochs_are_as_many_as_are_written(hundredths, steps_per_epoch):
    """In binary, 1.1 epochs of 10 steps are a little more than 11 steps."""
    expected = ceil(Fraction(hundredths, 100) * steps_per_epoch)
    assert RecoveryConfig(epochs=hundredths / 100).steps(steps_per_epoch) == expected
    assert RecoveryConfig(epochs=hundredths / 100, max_steps=5).steps(steps_per_epoch) == 5


@given(rows=st.integers(1, 40), at_once=st.integers(1, 12), ranks=st.integers(1, 9))
def test_ranks_that_do_not_share_a_step_evenly_are_told_a_number_that_works(rows, at_once, ranks):
    config = RecoveryConfig(batch_size=rows, micro_batch_size=at_once)
    if rows % (at_once * ranks) == 0:
        config.require_shared_evenly(ranks)
        return
    with pytest.raises(UserError) as caught:
        config.require_shared_evenly(ranks)
    told = re.search(r"set batch_size to (\d+)", str(caught.value))
    RecoveryConfig(batch_size=int(told[1]), micro_batch_size=at_once).require_shared_evenly(ranks)
