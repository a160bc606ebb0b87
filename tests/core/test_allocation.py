from functools import reduce
from operator import add

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.core.allocation import Ladder, allocate_globally, relative_to_mean, standardized


def scores(*layers):
    return [torch.tensor(layer, dtype=torch.float64) for layer in layers]


def test_steps_of_a_ladder_end_at_its_floor_and_at_all_its_units():
    ladder = Ladder(0, scores(range(10))[0], 3, 1, multiple_of=4)
    assert (ladder.most, ladder.least) == (10, 4)
    assert [ladder.below(count) for count in (10, 9, 8, 4)] == [8, 8, 4, 4]
    assert [ladder.above(count) for count in (4, 7, 8, 10)] == [8, 8, 10, 10]


def test_normalised_layers_have_mean_one():
    for layer in relative_to_mean(scores([1, 2, 3], [100, 200, 600])):
        assert layer.mean() == 1
    assert torch.equal(relative_to_mean(scores([0, 0]))[0], torch.zeros(2, dtype=torch.float64))


def test_standardized_layers_have_mean_zero_and_deviation_one_unless_they_are_in_deviations():
    layers = scores([1, 2, 3], [100, 200, 600], [5, 5], [7])
    first, second, alike, single = standardized(layers, in_deviations=False)
    assert first.tolist() == [-1, 0, 1] and float(second.std()) == pytest.approx(1.0)
    assert alike.tolist() == [0, 0] and single.tolist() == [0]
    centred = standardized(layers, in_deviations=True)
    assert [scores_U.tolist() for scores_U in centred] == [[-1, 0, 1], [-200, -100, 300], [0, 0], [0]]


def step_by_step(kept, removals):
    """The definition: steps are tuples in the order in which they are taken, and remember what they leave."""
    finest, steps = min(ladder.parameters for ladder in kept), []
    for place, ladder in enumerate(kept):
        rising, count, price, number = ladder.scores.sort().values.tolist(), ladder.most, 0.0, 0
        while (fewer := ladder.below(count)) < count:
            gone = rising[ladder.most - count : ladder.most - fewer]
            price = max(price, reduce(add, gone, 0.0) / len(gone) / (ladder.parameters / finest))
            steps.append((price, ladder.layer, place, number, fewer, len(gone) * ladder.parameters))
            count, number = fewer, number + 1
    taken = []
    for step in sorted(steps):
        if removals <= 0:
            break
        taken.append(step)
        removals -= step[-1]
    for step in [step for step in taken if kept[step[2]].parameters == finest][::-1]:
        if -2 * removals <= step[-1]:
            break
        taken.remove(step)
        removals += step[-1]
    return [min([ladder.most, *(step[4] for step in taken if step[2] == place)]) for place, ladder in enumerate(kept)]


@st.composite
def any_ladders(draw):
    """Draw ladders in any order of layers, of any sizes and multiples, with some negative scores and many ties."""
    ladders = []
    for _ in range(draw(st.integers(1, 5))):
        scores_of_units = draw(st.lists(st.sampled_from([-0.1, 0.0, 0.1, 0.2, 0.3, 0.7, 1.0]), min_size=1, max_size=9))
        ladders.append(
            Ladder(
                draw(st.integers(0, 2)),
                torch.tensor(scores_of_units, dtype=torch.float64),
                draw(st.integers(0, len(scores_of_units))),
                draw(st.sampled_from([1, 3, 10, 30])),
                draw(st.integers(1, 4)),
            )
        )
    return ladders


@settings(max_examples=100)
@given(any_ladders(), st.floats(-0.1, 1.1))
def test_the_same_go_as_step_by_step(kept, share):
    removals = round(share * sum(ladder.most * ladder.parameters for ladder in kept))
    assert allocate_globally(kept, removals) == step_by_step(kept, removals)


def test_groups_go_where_a_parameter_of_theirs_is_cheaper():
    neurons, groups = scores([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]), scores([12, 20], [3, 30])
    sizes = [(1, neurons), (4, groups)]
    kept = [Ladder(layer, scores_U, 1, size) for size, kind in sizes for layer, scores_U in enumerate(kind)]
    assert allocate_globally(kept, 6) == [5, 5, 2, 1]  # a group at 3 per parameter for 4 parameters, then neurons at 1
    assert allocate_globally(kept, 4) == [6, 6, 2, 1]
    assert allocate_globally(kept, 3) == [6, 6, 2, 1], "one parameter too many: there are no neurons to take back"
