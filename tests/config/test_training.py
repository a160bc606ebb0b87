"""How long recovery trains, how fast, and how ranks share its rows."""

import re
from fractions import Fraction
from math import ceil

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from pydantic import ValidationError

from hfprune_dist.config.training import DistillationConfig, RecoveryConfig
from hfprune_dist.errors import UserError


@given(hundredths=st.integers(1, 1000), steps_per_epoch=st.integers(1, 10_000))
@example(110, 10)
@example(7, 100)
def test_epochs_are_as_many_as_are_written(hundredths, steps_per_epoch):
    """In binary, 1.1 epochs of 10 steps are a little more than 11 steps."""
    expected = ceil(Fraction(hundredths, 100) * steps_per_epoch)
    assert RecoveryConfig(epochs=hundredths / 100).steps(steps_per_epoch) == expected


@pytest.mark.parametrize(
    ("epochs", "steps_per_epoch", "expected"),
    [(2 / 3, 3, 2), (0.6666667, 3, 3), (1e-9, 5, 1), (2.0, 7, 14), (1.1000001, 10, 12), (2.5, 3, 8)],
)
def test_only_what_is_no_fraction_of_steps_is_rounded_up(epochs, steps_per_epoch, expected):
    assert RecoveryConfig(epochs=epochs).steps(steps_per_epoch) == expected


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


def test_max_steps_overrides_epochs():
    assert RecoveryConfig(epochs=1.1, max_steps=5).steps(10) == 5


@pytest.mark.parametrize("section", [DistillationConfig, RecoveryConfig])
@given(rate=st.floats(0, exclude_min=True, allow_infinity=False))
@example(9.99e36)
@example(1e38)
def test_every_learning_rate_that_is_accepted_is_one_that_the_optimizer_can_use(section, rate):
    try:
        learning_rate = section(learning_rate=rate).learning_rate
    except ValidationError:
        assert rate >= 1e37
        return
    weight = torch.nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    torch.optim.AdamW([weight], lr=learning_rate).step()
    assert weight.isfinite().all()
