"""Kept units by number, in a model that was pruned before, and how many parameters they make up."""

from dataclasses import replace

import pytest
import torch
from tiny import FAMILY, tiny_model

from hfprune_dist.structures.kept import Kept, Shape


def test_a_shape_is_how_much_is_kept():
    kept = Kept((1, 3), {"kv_groups": [torch.tensor([0]), torch.tensor([1, 2])]})
    assert kept.shape == Shape((1, 3), {"kv_groups": (1, 2)})
    assert [kept.of_layer(layer, "kv_groups").tolist() for layer in kept.layers] == [[0], [1, 2]]
    assert Kept.of_all_layers({"neurons": [torch.tensor([4])] * 3}).layers == (0, 1, 2)


@pytest.mark.parametrize("layers", [(1, 0), (0, 0), ()])
def test_layers_stand_in_order(layers):
    units = FAMILY.units(tiny_model().config.to_dict())
    with pytest.raises(AssertionError, match="layers"):
        Shape(layers).counts(units)


def test_a_layer_keeps_at_least_one_of_its_units_and_at_most_all():
    units = FAMILY.units(tiny_model().config.to_dict())
    layers, most = tuple(range(units.num_layers)), units.most
    assert Shape(layers).counts(units) == units.counts
    for count in (1, most):
        assert Shape(layers, {"neurons": (count,) * units.num_layers}).counts(units) == (count,) * units.num_layers
    for count in (0, most + 1):
        with pytest.raises(AssertionError, match="can't keep"):
            Shape(layers, {"neurons": (count,) * units.num_layers}).counts(units)
    partly = replace(units, counts=(0, most))
    assert Shape((0, 1), {"neurons": (0, 1)}).counts(partly) == (0, 1), "of none it keeps none"
    assert Shape((1,)).counts(partly) == (most,)
