"""Kept units by number, in a model that was pruned before, and how many parameters they make up."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILY, VARIANTS, tiny_model

from hfprune_dist.structures.kept import Kept, ParameterCounts, Shape


def test_a_shape_is_how_much_is_kept():
    kept = Kept((1, 3), {"kv_groups": [torch.tensor([0]), torch.tensor([1, 2])]})
    assert kept.shape == Shape((1, 3), {"kv_groups": (1, 2)})
    assert [kept.of_layer(layer, "kv_groups").tolist() for layer in kept.layers] == [[0], [1, 2]]
    assert Kept.of_all_layers({"neurons": [torch.tensor([4])] * 3}).layers == (0, 1, 2)


def test_a_layer_keeps_at_least_one_of_its_units_and_at_most_all():
    units = FAMILY.structures(tiny_model().config.to_dict())["neurons"]
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


def counts_of(model):
    config = model.config.to_dict()
    units = FAMILY.structures(config)["neurons"]
    # As in a file, a tied head is a tensor of its own.
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = "lm_head.weight" if model.config.tie_word_embeddings else None
    return ParameterCounts(FAMILY.layout(config, shapes), shapes, {units.kind: units}, tied)


def size_of(model):
    return sum(parameter.numel() for parameter in model.parameters())


@settings(max_examples=20)
@given(variant=st.sampled_from(sorted(VARIANTS)), layers=st.integers(1, 3), width=st.integers(1, 7))
def test_a_shape_has_the_parameters_of_a_model_of_that_shape(variant, layers, width):
    dense = tiny_model(variant, num_hidden_layers=3, intermediate_size=7)
    smaller = tiny_model(variant, num_hidden_layers=layers, intermediate_size=width)
    counts = counts_of(dense)
    assert counts.total == size_of(dense) and counts.after(Shape((0, 1, 2))) == counts.total
    shape = Shape(tuple(range(3 - layers, 3)), {"neurons": (width,) * layers})
    assert counts.after(shape) == size_of(smaller)
    assert counts.ratio(shape) == pytest.approx(1 - size_of(smaller) / size_of(dense))


def test_each_layer_loses_its_own_units_and_matrices_of_low_rank_count_as_factors():
    dense = tiny_model("llama", num_hidden_layers=3, intermediate_size=7)
    counts, hidden = counts_of(dense), dense.config.hidden_size
    assert counts.total - counts.after(Shape((0, 1, 2), {"neurons": (7, 3, 6)})) == (4 + 1) * 3 * hidden
    outputs, inputs = dense.model.layers[0].self_attn.k_proj.weight.shape
    saved = counts.after(Shape((0, 2))) - counts.after(Shape((0, 2), ranks={"self_attn.k_proj": (1, 5)}))
    assert saved == 2 * outputs * inputs - (1 + 5) * (outputs + inputs)
