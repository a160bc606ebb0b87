import itertools
from fractions import Fraction
from functools import reduce
from operator import add

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from hfprune_dist.core.allocation import Ladder, allocate_globally, layer_mean_one, standardized


def scores(*layers):
    return [torch.tensor(layer, dtype=torch.float64) for layer in layers]


def ladders(layers, fewest, multiple_of=1, parameters=1):
    return [
        Ladder(number, scores_U, least, parameters, multiple_of)
        for number, (scores_U, least) in enumerate(zip(layers, fewest, strict=True))
    ]


def test_the_cheapest_of_all_layers_go():
    assert allocate_globally(ladders(scores([1, 9, 3, 8], [4, 2, 7, 6]), [1, 1]), 3) == [2, 3]
    assert allocate_globally(ladders(scores([1, 9, 3, 8], [4, 2, 7, 6]), [1, 1]), 4) == [2, 2]


def test_no_layer_falls_below_its_floor():
    assert allocate_globally(ladders(scores([1, 1, 1, 1], [5, 6, 7, 8]), [3, 1]), 4) == [3, 1]
    assert allocate_globally(ladders(scores([1, 1, 1, 1], [5, 6, 7, 8]), [4, 1]), 3) == [4, 1]  # protected


def test_ties_are_taken_from_lower_layers_then_from_earlier_ladders():
    assert allocate_globally(ladders(scores([2, 2, 2], [2, 2, 2]), [1, 1]), 2) == [1, 3]
    kinds = [Ladder(0, scores([4, 4])[0], 1, 2), Ladder(0, scores([2, 2])[0], 1, 1)]
    assert allocate_globally(kinds, 2) == [1, 2]
    assert allocate_globally(kinds[::-1], 1) == [1, 2]


def test_steps_of_a_ladder_end_at_its_floor_and_at_all_its_units():
    ladder = Ladder(0, scores(range(10))[0], 3, 1, multiple_of=4)
    assert (ladder.most, ladder.least) == (10, 4)
    assert [ladder.below(it) for it in (10, 9, 8, 4)] == [8, 8, 4, 4]
    assert [ladder.above(it) for it in (4, 7, 8, 10)] == [8, 8, 10, 10]


def test_widths_are_multiples_where_layers_lose_neurons():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(6)]
    for removals in (40, 100, 140):
        widths = allocate_globally(ladders(layers, [8] * 6, multiple_of=8), removals)
        assert all(width % 8 == 0 or width == 50 for width in widths)
        assert abs(300 - sum(widths) - removals) <= 4


def test_the_number_asked_for_is_met_exactly_without_rounding():
    generator = torch.Generator().manual_seed(1)
    layers = [torch.rand(30, generator=generator, dtype=torch.float64) for _ in range(5)]
    for removals in range(0, 140, 7):
        assert sum(allocate_globally(ladders(layers, [1] * 5), removals)) == 150 - removals


def test_normalised_layers_have_mean_one():
    for layer in layer_mean_one(scores([1, 2, 3], [100, 200, 600])):
        assert layer.mean() == 1
    assert torch.equal(layer_mean_one(scores([0, 0]))[0], torch.zeros(2, dtype=torch.float64))


def test_standardized_layers_have_mean_zero_and_deviation_one_unless_they_are_in_deviations():
    layers = scores([1, 2, 3], [100, 200, 600], [5, 5], [7])
    first, second, alike, single = standardized(layers, in_deviations=False)
    assert first.tolist() == [-1, 0, 1] and float(second.std()) == pytest.approx(1.0)
    assert alike.tolist() == [0, 0] and single.tolist() == [0]
    centred = standardized(layers, in_deviations=True)
    assert [it.tolist() for it in centred] == [[-1, 0, 1], [-200, -100, 300], [0, 0], [0]]


def of_neurons_alone(layers, removals, narrowest, multiple_of):
    """Earlier versions, which knew only neurons: stop where another step would be further from the target."""
    steps = []
    for layer, scores_D in enumerate(layers):
        rising, width, price, number = scores_D.sort().values.tolist(), len(scores_D), 0.0, 0
        while (narrower := (width - 1) // multiple_of * multiple_of) >= max(narrowest[layer], 1):
            gone = rising[len(rising) - width : len(rising) - narrower]
            price = max(price, sum(gone) / len(gone))
            steps.append((price, layer, number, len(gone)))
            width, number = narrower, number + 1
    widths = [len(scores_D) for scores_D in layers]
    for _, layer, _, size in sorted(steps):
        if removals < (size + 1) // 2:
            break
        widths[layer] -= size
        removals -= size
    return widths


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_of_neurons_alone_the_same_go_as_in_earlier_versions(data):
    sizes = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 9)))
    layers = [torch.rand(size, generator=generator, dtype=torch.float64).mul(5).round() / 3 for size in sizes]
    narrowest = [data.draw(st.integers(1, size)) for size in sizes]
    multiple_of, cost = data.draw(st.integers(1, 5)), data.draw(st.sampled_from([1, 3, 96]))
    removals = data.draw(st.integers(0, sum(sizes)))
    found = allocate_globally(ladders(layers, narrowest, multiple_of, cost), removals * cost)
    assert found == of_neurons_alone(layers, removals, narrowest, multiple_of)


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
    for step in [it for it in taken if kept[it[2]].parameters == finest][::-1]:
        if -2 * removals <= step[-1]:
            break
        taken.remove(step)
        removals += step[-1]
    return [min([it.most, *(step[4] for step in taken if step[2] == place)]) for place, it in enumerate(kept)]


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


@settings(max_examples=300, deadline=None)
@given(any_ladders(), st.floats(-0.1, 1.1))
def test_the_same_go_as_step_by_step(kept, share):
    removals = round(share * sum(ladder.most * ladder.parameters for ladder in kept))
    assert allocate_globally(kept, removals) == step_by_step(kept, removals)


@st.composite
def two_kinds(draw):
    """Draw neurons and, from the middle of the list on, groups, each as large as several neurons."""
    layers, cost = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    size = cost * draw(st.integers(2, 5))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))

    def some(kind_size, most):
        each = [torch.rand(most, generator=generator, dtype=torch.float64) * kind_size for _ in range(layers)]
        fewest = [draw(st.integers(1, most)) for _ in range(layers)]
        return ladders(each, fewest, parameters=kind_size)

    return [*some(cost, draw(st.integers(1, 5))), *some(size, draw(st.integers(1, 3)))]


def gone(kept, counts):
    return sum((ladder.most - count) * ladder.parameters for ladder, count in zip(kept, counts, strict=True))


def price_of(ladder, count):
    """Return the exact sum of the scores of a ladder's cheapest units, which go."""
    return sum(map(Fraction, ladder.scores.sort().values[: ladder.most - count].tolist()))


@settings(max_examples=60, deadline=None)
@given(two_kinds(), st.floats(0, 1))
def test_of_all_that_remove_as_much_none_is_cheaper(kept, share):
    """If the last step hits the target exactly, taking units in order of price is the best of all combinations."""
    lowest = [ladder.least for ladder in kept]
    removals = round(share * gone(kept, lowest))
    counts = allocate_globally(kept, removals)
    assert all(low <= count <= it.most for low, count, it in zip(lowest, counts, kept, strict=True))
    assume(gone(kept, counts) == removals)
    # A step of a large unit for which room had to be made is no threshold: compare only where nothing was taken back.
    paid = sum(map(price_of, kept, counts))
    worst = (
        max(
            (it.scores.sort().values[it.most - count - 1].item() / it.parameters)
            for it, count in zip(kept, counts, strict=True)
            if count < it.most
        )
        if removals
        else 0.0
    )
    next_ones = [
        it.scores.sort().values[it.most - count].item() / it.parameters
        for it, count in zip(kept, counts, strict=True)
        if count > it.least
    ]
    assume(not next_ones or worst <= min(next_ones))
    every = itertools.product(*(range(it.least, it.most + 1) for it in kept))
    best = min(sum(map(price_of, kept, other)) for other in every if gone(kept, other) == removals)
    assert float(paid) == pytest.approx(float(best), abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(two_kinds(), st.floats(0, 1))
def test_what_goes_is_within_half_a_neuron_while_neurons_can_make_up_for_groups(kept, share):
    half = len(kept) // 2
    removals = round(share * gone(kept, [ladder.least for ladder in kept]))
    counts = allocate_globally(kept, removals)
    error, neuron = gone(kept, counts) - removals, kept[0].parameters
    left = [count < it.most for it, count in zip(kept[:half], counts[:half], strict=True)]
    assert 2 * abs(error) <= neuron or (error > 0 and not any(left) and error < kept[-1].parameters)


@settings(max_examples=60, deadline=None)
@given(two_kinds(), st.floats(0, 1), st.floats(1, 5))
def test_the_dearer_groups_are_the_more_of_them_stay(kept, share, rate):
    half = len(kept) // 2
    removals = round(share * gone(kept, [ladder.least for ladder in kept]))
    cheap, dear = (
        allocate_globally([*kept[:half], *(it.dearer(factor) for it in kept[half:])], removals) for factor in (1, rate)
    )
    assert all(a <= b for a, b in zip(cheap[half:], dear[half:], strict=True))


def test_groups_go_where_a_parameter_of_theirs_is_cheaper():
    neurons, groups = scores([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 5, 6]), scores([12, 20], [3, 30])
    kept = [*ladders(neurons, [1, 1]), *ladders(groups, [1, 1], parameters=4)]
    assert allocate_globally(kept, 6) == [5, 5, 2, 1]  # a group at 3 per parameter for 4 parameters, then neurons at 1
    assert allocate_globally(kept, 4) == [6, 6, 2, 1]
    assert allocate_globally(kept, 3) == [6, 6, 2, 1], "one parameter too many: there are no neurons to take back"
