"""Kept units by number, in a model that was pruned before, and how many parameters they make up."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import kept_of
from tiny import tiny_model

from hfprune_dist.checkpoints.families import FAMILIES
from hfprune_dist.structures.kept import Kept, Shape


def model_of(kept, neurons, groups):
    return {"num_hidden_layers": len(kept.layers), "intermediate_size": neurons, "num_key_value_heads": groups}


def survivors(kept, layers, counts):
    """Map each unit that stays to where it was, both as (layer, kind, unit)."""
    found = {}
    for number, layer in enumerate(layers):
        for kind, count in counts.items():
            rows = kept.units.get(kind)
            for index, unit in enumerate(range(count) if rows is None else rows[number].tolist()):
                found[number, kind, index] = (layer, kind, unit)
    return found


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.data())
def test_numbers_of_a_second_pruning_are_those_of_the_dense_model(data):
    counts = {"neurons": 6, "kv_groups": 4}
    first = data.draw(kept_of({"num_hidden_layers": 4, "intermediate_size": 6, "num_key_value_heads": 4}, uniform=True))
    left = counts | {kind: sizes[0] for kind, sizes in first.shape.units.items()}
    second = data.draw(kept_of(model_of(first, left["neurons"], left["kv_groups"]), uniform=False))
    there = survivors(first, first.layers, counts)
    expected = {key: there[place] for key, place in survivors(second, second.layers, left).items()}
    whole = second.numbered_by(first)
    assert survivors(whole, whole.layers, counts) == expected
    assert whole.units.keys() == first.units.keys() | second.units.keys()


def test_what_has_low_ranks_is_not_pruned_again():
    kept = Kept((0,), {"neurons": [torch.tensor([0, 2])]})
    with pytest.raises(AssertionError, match="factors"):
        kept.numbered_by(replace(kept, ranks={"self_attn.k_proj": (1,)}))


def test_a_shape_is_how_much_is_kept():
    kept = Kept((1, 3), {"kv_groups": [torch.tensor([0]), torch.tensor([1, 2])]})
    assert kept.shape == Shape((1, 3), {"kv_groups": (1, 2)})
    assert [kept.of_layer(layer, "kv_groups").tolist() for layer in kept.layers] == [[0], [1, 2]]
    assert Kept.of_all_layers({"neurons": [torch.tensor([4])] * 3}).layers == (0, 1, 2)


@pytest.mark.parametrize("layers", [(1, 0), (0, 0), ()])
def test_layers_stand_in_order(layers):
    units = FAMILIES["llama"].units(tiny_model().config.to_dict())
    with pytest.raises(AssertionError, match="layers"):
        Shape(layers).counts(units)


def test_a_layer_keeps_at_least_one_of_its_units_and_at_most_all():
    units = FAMILIES["llama"].units(tiny_model().config.to_dict())
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
