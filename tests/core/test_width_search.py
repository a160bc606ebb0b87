import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.core.allocation import Ladder, allocate_globally
from hfprune_dist.core.width_search import ReweightedShapes, Reweighting, drop_order, search_shapes


def some_scores(layers=6, neurons=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(neurons, generator=generator, dtype=torch.float64) * (1 + layer) for layer in range(layers)]


def ladders(scores, narrowest, multiple_of=1, parameters=1):
    return [
        Ladder(layer, scores_U, least, parameters, multiple_of)
        for layer, (scores_U, least) in enumerate(zip(scores, narrowest, strict=True))
    ]


def of_neurons(scores, removals, narrowest, multiple_of):
    return ReweightedShapes(ladders(scores, narrowest, multiple_of), [], removals)


def test_the_middle_of_the_family_is_what_scores_want():
    scores = some_scores()
    reweighted = of_neurons(scores, 90, [4] * 6, 1)
    assert list(reweighted.counts(Reweighting(0.0, 0.0, 0.0))) == allocate_globally(ladders(scores, [4] * 6), 90)


def test_tilt_and_bend_move_neurons_between_layers():
    reweighted = of_neurons([torch.linspace(0.01, 1, 40, dtype=torch.float64)] * 6, 90, [4] * 6, 1)
    tilted = reweighted.counts(Reweighting(0.0, 1.0, 0.0))
    assert list(tilted) == sorted(tilted) and tilted[0] < 25 < tilted[-1]
    bent = reweighted.counts(Reweighting(0.0, 0.0, 1.0))
    assert min(bent[0], bent[-1]) > 25 > max(bent[2], bent[3])


def test_every_shape_removes_the_same_and_keeps_to_floors_and_multiples():
    scores = some_scores(neurons=50)
    for unit, removals in ((1, 101), (8, 96)):
        narrowest = [50, 10, 10, 10, 10, 10]
        reweighted = of_neurons(scores, removals, narrowest, unit)
        for shape in (Reweighting(0.3, 0.7, 0.0), Reweighting(0.0, -1.0, 0.5), Reweighting(0.9, 0.2, -1.0)):
            widths = reweighted.counts(shape)
            assert abs(300 - sum(widths) - removals) <= unit // 2
            assert all(least <= width <= 50 for least, width in zip(narrowest, widths, strict=True))
            assert all(width == 50 or width % unit == 0 for width in widths)


def test_finds_the_bottom_of_a_bowl():
    reweighted = of_neurons(some_scores(), 90, [4] * 6, 1)
    goal = torch.tensor(reweighted.counts(Reweighting(0.4, 0.5, -0.3)), dtype=torch.float64)
    calls = []

    def measure(candidates):
        calls.append(len(candidates))
        return [float((torch.tensor(widths) - goal).square().sum()) for widths in candidates]

    found, _ = search_shapes(reweighted, {"uniform": (25,) * 6}, measure)
    start = measure([reweighted.counts(Reweighting(0.0, 0.0, 0.0))])[0]
    assert measure([found])[0] < 0.1 * start
    assert max(calls) <= 8 and len(calls) == 5  # three of the search, two of this test


def test_is_never_worse_than_the_uniform_widths_or_scores_alone():
    reweighted = of_neurons(some_scores(), 90, [4] * 6, 1)
    uniform = (25,) * 6
    found, measured = search_shapes(
        reweighted, {"uniform": uniform}, lambda many: [0.1 if counts == uniform else 1.0 for counts in many]
    )
    assert found == uniform and min(measured, key=measured.__getitem__) == "uniform"
    alone = reweighted.counts(Reweighting(0.0, 0.0, 0.0))
    assert search_shapes(reweighted, {}, lambda many: [float(counts != alone) for counts in many])[0] == alone


def of_both(removals):
    groups = [scores_U * 20 for scores_U in some_scores(neurons=4, seed=1)]
    neurons = ladders(some_scores(), [4] * 6)
    return ReweightedShapes(neurons, ladders(groups, [1] * 6, parameters=20), removals)


def test_the_exchange_moves_parameters_between_kinds_and_keeps_their_sum():
    reweighted, kept = of_both(300), []
    for exchange in (-3.0, 0.0, 0.5, 1.5, 3.0):
        counts = reweighted.counts(Reweighting(0.25, 0.3, -0.2, exchange))
        assert 6 * 40 - sum(counts[:6]) + 20 * (6 * 4 - sum(counts[6:])) == 300
        kept.append(sum(counts[6:]))
    assert kept == sorted(kept) and kept[0] < kept[-1]


def costs(layers, seed):
    """Return a divergence for every set of layers that go; adjacent layers cost more together than alone."""

    def of(gone):
        alone = sum(((layer + 1) * 7919 + seed) % 101 for layer in gone)
        beside = sum(10 for one, other in itertools.pairwise(gone) if other == one + 1)
        return float(alone + beside)

    return lambda sets: [of(gone) for gone in sets]


def greedy(droppable, count, measure):
    """Drop layers one at a time, and measure every remaining layer again after each."""
    order = []
    while len(order) < min(count, len(droppable)):
        left = [layer for layer in droppable if layer not in order]
        kls = measure([tuple(sorted([*order, layer])) for layer in left])
        order.append(min(zip(kls, left, strict=True))[1])
    return order


@given(st.sets(st.integers(0, 40), max_size=5), st.integers(0, 12), st.integers(0, 100))
def test_few_layers_are_all_measured_again_after_each(layers, count, seed):
    droppable = sorted(layers)
    assert drop_order(droppable, count, costs(layers, seed), 5) == greedy(droppable, count, costs(layers, seed))


def test_a_layer_that_is_missed_more_beside_another_waits():
    """Dropped alone, 1, 2 and 3 cost least, in this order; without 1, its neighbour 2 costs more than 3 does."""
    kl = {(1,): 0.1, (2,): 0.2, (3,): 0.3, (1, 2): 0.9, (1, 3): 0.4, (1, 2, 3): 1.0}
    assert drop_order([1, 2, 3], 3, lambda sets: [kl[gone] for gone in sets], 5) == [1, 3, 2]
    assert drop_order([1, 2, 3], 2, lambda sets: [kl[gone] for gone in sets], 0) == [1, 2]
