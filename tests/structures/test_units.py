"""Units against the models that they belong to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pairs import CHANNELS, PAIRS
from tiny import FAMILY, VARIANTS, tiny_model

from hfprune_dist.structures.units import LAYER_SIZES


@pytest.fixture(params=["neurons", "pairs"])
def channels(request):
    """Return how many of the channels that down_proj reads make up a unit."""
    return 1 if request.param == "neurons" else CHANNELS


def units_of(config, channels=1):
    return (FAMILY if channels == 1 else PAIRS).units(config)


def shapes_of(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_a_unit_owns_is_what_a_smaller_model_lacks(variant, channels):
    larger, smaller = (tiny_model(variant, intermediate_size=count * channels) for count in (5, 4))
    units, shapes = units_of(larger.config.to_dict(), channels), shapes_of(larger)
    assert units.counts == (5, 5) and units.is_uniform and units.most == 5
    owned = dict(item for layer in range(2) for item in units.in_layer(layer, shapes))
    for name, shape in shapes_of(smaller).items():
        if name in owned:
            axis, per_unit = owned[name].axis, owned[name].per_unit
            assert shapes[name][axis] == 5 * per_unit and shape[axis] == 4 * per_unit
        else:
            assert shapes[name] == shape, name
    lost = sum(parameter.numel() for parameter in larger.parameters())
    lost -= sum(parameter.numel() for parameter in smaller.parameters())
    assert units.parameters_per_unit(shapes) * 2 == lost


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_output_projections_of_a_model_read_the_units_channels(variant, channels):
    model = tiny_model(variant)
    units = units_of(model.config.to_dict(), channels)
    projections = units.outputs_of(model)
    assert projections == [layer.mlp.down_proj for layer in model.model.layers]
    assert all(it.in_features == units.most * units.channels_per_unit for it in projections)
    assert [model.get_parameter(units.output_weight(layer)) is projections[layer].weight for layer in range(2)]
    rows = [model.get_parameter(name) for name in units.row_weights(1)]
    mlp = model.model.layers[1].mlp
    assert all(torch.equal(*pair) for pair in zip(rows, (mlp.gate_proj.weight, mlp.up_proj.weight), strict=True))


@settings(max_examples=50)
@given(counts=st.lists(st.integers(1, 40), min_size=1, max_size=6), pairs=st.booleans())
def test_what_config_json_says_is_read_back(counts, pairs):
    size = CHANNELS if pairs else 1
    config = {"model_type": "llama", "num_hidden_layers": len(counts), "intermediate_size": 80}
    units = units_of(config, size)
    values = units.values(counts)["intermediate_size"]
    assert units_of(config | {LAYER_SIZES: {"intermediate_size": values}}, size).counts == tuple(counts)
    assert units.sizes(counts)["intermediate_sizes"] == [count * size for count in counts]
    assert units.sizes(counts)["intermediate_size"] == (size * counts[0] if len(set(counts)) == 1 else None)


def test_layers_without_units_have_no_say_in_the_one_size_that_results_state():
    units = units_of({"model_type": "llama", "num_hidden_layers": 3, "intermediate_size": 80})
    assert units.sizes([0, 40, 40]) == {"intermediate_size": 40}
    assert units.sizes([0, 40, 30]) == {"intermediate_size": None}
    assert units.sizes([40, 40, 40]) == {"intermediate_size": 40, "intermediate_sizes": [40, 40, 40]}
