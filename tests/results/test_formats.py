"""Numbers at the edges of their units, and zeros."""

import pytest

from hfprune_dist.results.formats import byte_count, count, counted, duration, flop_count, measured, percent_measured


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        *((count(999_949), "999.9k"), (count(999_999), "1M"), (count(999_960_000_000), "1000B")),
        *((byte_count(999_400_000), "999MB"), (byte_count(999_600_000), "1.0GB"), (flop_count(9.996e14), "1.0P")),
        *((duration(99.4), "99s"), (duration(99.6), "1.7m"), (duration(5_990), "1.7h"), (duration(0), "0s")),
    ],
)
def test_what_would_be_rounded_to_a_further_digit_is_in_the_next_unit(shown, expected):
    assert shown == expected


def test_a_divergence_that_rounding_made_negative_is_shown_as_zero():
    assert measured(-1e-9, 1e-9, 3) == "0.000±0.000"
    assert measured(-0.25, None, 1) == "-0.2±-"


def test_one_of_something_is_not_several():
    assert [counted(it, "window") for it in (1, 2, "1", "1-4", None)] == [
        *("1 window", "2 windows", "1 window"),
        *("1-4 windows", "None windows"),
    ]


def test_a_share_and_its_error_are_both_in_percent():
    assert percent_measured(0.4567, 0.0123) == "45.7±1.2"
    assert percent_measured(0.0, None) == "0.0±-" and percent_measured(None, None) == "-"
