import torch

from hfprune_dist.core.allocation import allocate_globally, layer_mean_one


def scores(*layers):
    return [torch.tensor(layer, dtype=torch.float64) for layer in layers]


def test_the_cheapest_of_all_layers_go():
    assert allocate_globally(scores([1, 9, 3, 8], [4, 2, 7, 6]), 3, [1, 1]) == [2, 3]
    assert allocate_globally(scores([1, 9, 3, 8], [4, 2, 7, 6]), 4, [1, 1]) == [2, 2]


def test_no_layer_falls_below_its_floor():
    assert allocate_globally(scores([1, 1, 1, 1], [5, 6, 7, 8]), 4, [3, 1]) == [3, 1]
    assert allocate_globally(scores([1, 1, 1, 1], [5, 6, 7, 8]), 3, [4, 1]) == [4, 1]  # protected


def test_ties_are_taken_from_lower_layers():
    assert allocate_globally(scores([2, 2, 2], [2, 2, 2]), 2, [1, 1]) == [1, 3]


def test_widths_are_multiples_where_layers_lose_neurons():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(50, generator=generator, dtype=torch.float64) for _ in range(6)]
    for removals in (40, 100, 140):
        widths = allocate_globally(layers, removals, [8] * 6, multiple_of=8)
        assert all(width % 8 == 0 or width == 50 for width in widths)
        assert abs(300 - sum(widths) - removals) <= 4


def test_the_number_asked_for_is_met_exactly_without_rounding():
    generator = torch.Generator().manual_seed(1)
    layers = [torch.rand(30, generator=generator, dtype=torch.float64) for _ in range(5)]
    for removals in range(0, 140, 7):
        assert sum(allocate_globally(layers, removals, [1] * 5)) == 150 - removals


def test_normalised_layers_have_mean_one():
    for layer in layer_mean_one(scores([1, 2, 3], [100, 200, 600])):
        assert layer.mean() == 1
    assert torch.equal(layer_mean_one(scores([0, 0]))[0], torch.zeros(2, dtype=torch.float64))
