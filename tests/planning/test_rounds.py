"""The ratios of rounds: rising, shared, and distinguishable on a model."""

from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.config.method import Method
from hfprune_dist.planning.rounds import round_ratios

HUNDREDTHS = st.integers(1, 99).map(lambda number: number / 100)


def in_steps(ratio, steps):
    return round_ratios(Method(criterion="entropy", steps=steps), ratio)


def in_rounds(ratio, size):
    return round_ratios(Method(criterion="entropy", round_ratio=size), ratio)


def test_steps_are_equal_parts_that_end_at_the_ratio_itself():
    assert in_steps(0.4, 1) == [0.4] and in_steps(0.4, 2) == [0.2, 0.4]
    assert in_steps(0.3, 3) == [0.1, 0.2, 0.3], "not 0.09999999999999999, which no other row asks for"


def test_rounds_are_of_one_size_but_for_the_last():
    assert in_rounds(0.5, 0.1) == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert in_rounds(0.25, 0.1) == [0.1, 0.2, 0.25] and in_rounds(0.1, 0.1) == [0.1] and in_rounds(0.05, 0.1) == [0.05]


@given(ratio=HUNDREDTHS, larger=HUNDREDTHS, size=HUNDREDTHS)
def test_a_larger_ratio_goes_through_all_rounds_of_a_smaller_one_but_the_last(ratio, larger, size):
    ratio, larger = sorted([ratio, larger])
    rounds, more = in_rounds(ratio, size), in_rounds(larger, size)
    assert rounds == sorted(set(rounds)) and rounds[-1] == ratio
    assert more[: len(rounds) - 1] == rounds[:-1]
    assert all(round(later - earlier, 9) <= size for earlier, later in zip([0, *rounds], rounds, strict=False))
    is_on_the_way = round(ratio * 100) % round(size * 100) == 0
    assert (ratio in more) == (is_on_the_way or ratio == larger)
