"""How long recovery trains."""

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from hfprune_dist.config.training import RecoveryConfig


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


def test_max_steps_overrides_epochs():
    assert RecoveryConfig(epochs=1.1, max_steps=5).steps(10) == 5
