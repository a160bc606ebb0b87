"""The order in which layers are dropped, compared with a search that tries all of them."""

import itertools

from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.core import drop_order as module
from hfprune_dist.core.drop_order import CONTENDERS, drop_order


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


@given(st.sets(st.integers(0, 40), max_size=CONTENDERS), st.integers(0, 12), st.integers(0, 100))
def test_few_layers_are_all_measured_again_after_each(layers, count, seed):
    droppable = sorted(layers)
    assert drop_order(droppable, count, costs(layers, seed)) == greedy(droppable, count, costs(layers, seed))


def test_a_layer_that_is_missed_more_beside_another_waits(monkeypatch):
    """Dropped alone, 1, 2 and 3 cost least, in this order; without 1, its neighbour 2 costs more than 3 does."""
    kl = {(1,): 0.1, (2,): 0.2, (3,): 0.3, (1, 2): 0.9, (1, 3): 0.4, (1, 2, 3): 1.0}
    assert drop_order([1, 2, 3], 3, lambda sets: [kl[gone] for gone in sets]) == [1, 3, 2]
    monkeypatch.setattr(module, "CONTENDERS", 1)
    assert drop_order([1, 2, 3], 2, lambda sets: [kl[gone] for gone in sets]) == [1, 2]
