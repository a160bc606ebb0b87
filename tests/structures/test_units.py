"""Units against the models that they belong to."""

import pytest
import torch
from tiny import FAMILY, VARIANTS, tiny_model
from unit_outputs import outputs_of


def units_of(config):
    return FAMILY.structures({"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 32, **config})


def shapes_of(model):
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("kind", ["neurons", "kv_groups"])
def test_what_a_unit_owns_is_what_a_smaller_model_lacks(variant, kind):
    def model(count):
        if kind == "neurons":
            return tiny_model(variant, intermediate_size=count)
        return tiny_model(variant, num_attention_heads=2 * count, num_key_value_heads=count, head_dim=8)

    larger, smaller = model(4), model(2)
    units, shapes = units_of(larger.config.to_dict())[kind], shapes_of(larger)
    assert units.counts == (4, 4) and units.is_uniform and units.most == 4
    owned = {units.tensor(layer, name): (place, each) for layer in range(2) for name, place, each in units.owned}
    for name, shape in shapes_of(smaller).items():
        if name in owned:
            place, each = owned[name]
            assert shapes[name][place] == 4 * each.entries and shape[place] == 2 * each.entries
        else:
            assert shapes[name] == shape, name
    projections = outputs_of(units, larger)
    assert all(projection.in_features == 4 * units.channels_per_unit for projection in projections)
    names = [units.tensor(1, name) for name in units.weights]
    assert larger.get_parameter(names[-1]) is projections[1].weight
    if kind == "neurons":
        mlp = larger.model.layers[1].mlp
        assert torch.equal(larger.get_parameter(names[0]), mlp.gate_proj.weight) and len(names) == 3


def test_layers_without_units_have_no_say_in_the_one_size_that_results_state():
    units = units_of({"model_type": "llama", "num_hidden_layers": 3, "intermediate_size": 80})["neurons"]
    assert units.sizes([0, 40, 40]) == {"intermediate_size": 40}
    assert units.sizes([0, 40, 30]) == {"intermediate_size": None}
