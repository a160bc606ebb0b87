"""How long recovery trains."""

from fractions import Fraction
from math import ceil

from hypothesis import example, given
from hypothesis import strategies as st

from hfprune_dist.config.training import RecoveryConfig


@given(hundredths=st.integers(1, 1000), steps_per_epoch=st.integers(1, 10_000))
@example(110, 10)
def test_epochs_are_as_many_as_are_written(hundredths, steps_per_epoch):
    """In binary, 1.1 epochs of 10 steps are a little more than 11 steps."""
    expected = ceil(Fraction(hundredths, 100) * steps_per_epoch)
    assert RecoveryConfig(epochs=hundredths / 100).steps(steps_per_epoch) == expected
    assert RecoveryConfig(epochs=hundredths / 100, max_steps=5).steps(steps_per_epoch) == 5
