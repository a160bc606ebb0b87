import torch

from hfprune_dist.core.allocation import allocate_globally
from hfprune_dist.core.width_search import ReweightedWidths, Reweighting, search_widths


def some_scores(layers=6, neurons=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(neurons, generator=generator, dtype=torch.float64) * (1 + layer) for layer in range(layers)]


def test_the_middle_of_the_family_is_what_scores_want():
    scores = some_scores()
    reweighted = ReweightedWidths(scores, 90, [4] * 6, 1)
    assert list(reweighted.widths(Reweighting(0.0, 0.0, 0.0))) == allocate_globally(scores, 90, [4] * 6)


def test_all_even_is_uniform():
    assert ReweightedWidths(some_scores(), 90, [4] * 6, 1).widths(Reweighting(1.0, 0.0, 0.0)) == (25,) * 6


def test_tilt_and_bend_move_neurons_between_layers():
    reweighted = ReweightedWidths([torch.linspace(0.01, 1, 40, dtype=torch.float64)] * 6, 90, [4] * 6, 1)
    tilted = reweighted.widths(Reweighting(0.0, 1.0, 0.0))
    assert list(tilted) == sorted(tilted) and tilted[0] < 25 < tilted[-1]
    bent = reweighted.widths(Reweighting(0.0, 0.0, 1.0))
    assert min(bent[0], bent[-1]) > 25 > max(bent[2], bent[3])


def test_every_shape_removes_the_same_and_keeps_to_floors_and_multiples():
    scores = some_scores(neurons=50)
    for unit, removals in ((1, 101), (8, 96)):
        narrowest = [50, 10, 10, 10, 10, 10]
        reweighted = ReweightedWidths(scores, removals, narrowest, unit)
        for shape in (Reweighting(0.3, 0.7, 0.0), Reweighting(0.0, -1.0, 0.5), Reweighting(0.9, 0.2, -1.0)):
            widths = reweighted.widths(shape)
            assert abs(300 - sum(widths) - removals) <= unit // 2
            assert all(least <= width <= 50 for least, width in zip(narrowest, widths, strict=True))
            assert all(width == 50 or width % unit == 0 for width in widths)


def test_finds_the_bottom_of_a_bowl():
    reweighted = ReweightedWidths(some_scores(), 90, [4] * 6, 1)
    goal = torch.tensor(reweighted.widths(Reweighting(0.4, 0.5, -0.3)), dtype=torch.float64)
    calls = []

    def measure(candidates):
        calls.append(len(candidates))
        return [float((torch.tensor(widths) - goal).square().sum()) for widths in candidates]

    found = search_widths(reweighted, (25,) * 6, measure)
    start = measure([reweighted.widths(Reweighting(0.0, 0.0, 0.0))])[0]
    assert measure([found.widths])[0] < 0.1 * start
    assert max(calls) <= 8 and len(calls) == 5  # three of the search, two of this test


def test_is_never_worse_than_the_uniform_widths_or_scores_alone():
    reweighted = ReweightedWidths(some_scores(), 90, [4] * 6, 1)
    uniform = (25,) * 6
    found = search_widths(reweighted, uniform, lambda candidates: [0.1 if it == uniform else 1.0 for it in candidates])
    assert found.widths == uniform and min(found.candidates, key=found.candidates.__getitem__) == "uniform"
    alone = reweighted.widths(Reweighting(0.0, 0.0, 0.0))
    assert search_widths(reweighted, None, lambda many: [float(it != alone) for it in many]).widths == alone
