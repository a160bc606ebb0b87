"""Numbers at the edges of their units, and zeros."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.results.formats import (
    byte_count,
    count,
    counted,
    duration,
    flop_count,
    hours,
    latency,
    measured,
    percent,
    percent_measured,
)


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        *((count(999_949), "999.9k"), (count(999_999), "1M"), (count(999_960_000_000), "1000B")),
        *((byte_count(999_400_000), "999MB"), (byte_count(999_600_000), "1.0GB"), (flop_count(9.996e14), "1.0P")),
        *((duration(99.4), "99s"), (duration(99.5), "1.7m"), (duration(5_990), "1.7h"), (duration(0), "0s")),
        *((byte_count(9.94e9), "9.9GB"), (byte_count(9.96e9), "10GB"), (byte_count(1e10), "10GB")),
        *((duration(596), "9.9m"), (duration(598), "10m"), (duration(600), "10m"), (flop_count(9.97e12), "10T")),
        *((latency(0.9994), "999ms"), (latency(0.9996), "1s"), (latency(99.9), "99.9s"), (latency(99.96), "1.7m")),
        *((latency(1000), "17m"), (latency(1e6), "12d")),
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


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        (count, ["5", "5k", "5M", "5B"]),
        (flop_count, ["5", *(f"5.0{unit}" for unit in "kMGTPEZ")]),
        (byte_count, ["5B", *(f"5.0{unit}B" for unit in "kMGT")]),
    ],
)
def test_each_unit_is_a_thousand_of_the_one_before(form, expected):
    assert [form(5 * 1000**power) for power in range(len(expected))] == expected


def test_times_have_two_or_three_digits():
    assert [hours(it) for it in (0.0123, 9.4, 10, 12.4, 1234.5)] == ["0.012", "9.4", "10", "12", "1234"]
    assert [latency(it) for it in (0.00012345, 0.0123, 1.5)] == ["0.123ms", "12.3ms", "1.5s"]
    assert [duration(it) for it in (5, 300, 7200, 864_000)] == ["5s", "5.0m", "2.0h", "10d"]


@pytest.mark.parametrize("form", [byte_count, count, duration, flop_count, hours, latency, percent])
def test_what_is_not_known_is_a_dash(form):
    assert form(None) == "-"


@given(st.floats(1e-3, 1e6))
def test_no_time_and_no_rate_is_in_scientific_notation(value):
    assert not any("e" in form(value) for form in (count, duration, latency))


@given(st.floats(1, 1e6))
def test_scaled_numbers_have_their_digits_at_every_edge(value):
    for form, digits in ((byte_count, 3), (flop_count, 3), (duration, 2)):
        shown = form(value).rstrip("sBmhdkMG")
        assert len(shown.replace(".", "")) <= digits
        assert "." not in shown or float(shown) < 10
