"""Numbers at the edges of their units, and zeros."""

import pytest

from hfprune_dist.results.formats import byte_count, count, counted, duration, percent, with_error
from hfprune_dist.results.metrics import METRICS


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        *((count(999_949), "999.9k"), (count(999_999), "1M"), (count(67_278_528), "67.28M"), (count(9.9996e14), "1P")),
        *((byte_count(5), "5B"), (byte_count(999_400_000), "999MB"), (byte_count(999_600_000), "1.0GB")),
        *((byte_count(9.94e9), "9.9GB"), (byte_count(9.96e9), "10GB"), (byte_count(1e10), "10GB")),
        *((duration(0), "0s"), (duration(99.4), "99s"), (duration(99.5), "1.7m"), (duration(5_990), "1.7h")),
        *((duration(596), "9.9m"), (duration(598), "10m"), (duration(1e9), "11574d")),
        *((counted(1, "window"), "1 window"), (counted(2, "window"), "2 windows"), (counted("1-4", "a"), "1-4 as")),
        *((with_error(0.4567, 0.0123, percent), "45.7±1.2"), (with_error(None, None, percent), "-")),
        (with_error(-1e-9, 1e-9, METRICS["kl"].form), "0.000±0.000"),
    ],
)
def test_numbers_are_short(shown, expected):
    assert shown == expected
