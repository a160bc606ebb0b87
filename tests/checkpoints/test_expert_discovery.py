"""Discovery of experts by names and shapes, and refusals of what doesn't have their form."""

import pytest
from headers import checkpoint_of, grouped_mixtures, mixtures, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.checkpoints.checkpoint import check_shapes
from hfprune_dist.checkpoints.discovery import discover
from hfprune_dist.errors import UserError
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, NEURONS, SHARED_NEURONS


@given(mixtures())
def test_every_mlp_has_its_neurons(config):
    checkpoint = checkpoint_of(config)
    layers, first = config["num_hidden_layers"], config["first_k_dense_replace"]
    structures, experts = checkpoint.structures, config["num_experts"]
    shared = config.get("shared_expert_intermediate_size") or (
        config.get("n_shared_experts", 0) * config["moe_intermediate_size"]
    )
    sizes = {EXPERT_NEURONS: experts * config["moe_intermediate_size"], SHARED_NEURONS: shared}
    for kind, size in sizes.items():
        expected = (0,) * first + (size,) * (layers - first) if size else None
        assert (structures[kind].counts if kind in structures else None) == expected
    expected = (config["intermediate_size"],) * first + (0,) * (layers - first) if first else None
    assert (structures[NEURONS].counts if NEURONS in structures else None) == expected
    check_shapes(checkpoint.path, checkpoint.tensors, structures, checkpoint.layout)
    owned = [name for kind, units in structures.items() if kind != EXPERTS for name in owned_of(units, checkpoint)]
    mlps = {name for name in checkpoint.tensors if "_proj" in name}
    assert len(owned) == len({*owned}) and {*owned} == mlps


def owned_of(units, checkpoint):
    layers = range(units.num_layers)
    return [name for layer in layers for name in units.in_layer(layer, checkpoint.tensors)]


@given(grouped_mixtures())
def test_experts_own_their_tensors_and_their_rows_of_what_chooses_them(config):
    checkpoint = checkpoint_of(config)
    layers, first, count = (config[key] for key in ("num_hidden_layers", "first_k_dense_replace", "num_experts"))
    experts = checkpoint.structures[EXPERTS]
    assert experts.counts == (0,) * first + (count,) * (layers - first)
    assert experts.parts == config.get("n_group", 1) and {*experts.fields} == {"num_experts"}
    owned = owned_of(experts, checkpoint)
    assert len(owned) == len({*owned})
    assert {*owned} == {name for name in checkpoint.tensors if ".experts." in name or ".gate." in name}
    check_shapes(checkpoint.path, checkpoint.tensors, checkpoint.structures, checkpoint.layout)


REFUSED = {
    "a token can't have None": {"num_experts_per_tok": None},
    "a token can't have 99": {"num_experts_per_tok": 99},
    "and num_experts is 1": {"num_experts": 1},
    r"5 experts|7 experts": {"num_experts": 5, "n_routed_experts": 7},
    "groups of which a token has 9": {"topk_group": 9},
}


@given(mixtures(), st.sampled_from(sorted(REFUSED)))
def test_config_json_must_agree_with_itself_and_the_files(config, why):
    with pytest.raises(UserError, match="here: model_type 'new_moe' is not supported"):
        discover(config | REFUSED[why], tensors_of(config), "here")


@given(mixtures(), st.data())
def test_a_tensor_that_is_missing_of_another_shape_or_there_besides_is_named(config, data):
    checkpoint, shapes = checkpoint_of(config), tensors_of(config)
    name = data.draw(st.sampled_from(sorted(tensor for tensor in shapes if "experts" in tensor or ".gate." in tensor)))
    info = checkpoint.tensors[name]
    wrong = {**checkpoint.tensors, name: type(info)(**{**vars(info), "shape": (99, *info.shape[1:-1], 63)})}
    with pytest.raises(UserError, match=name.replace(".", r"\.") + " has shape"):
        check_shapes(checkpoint.path, wrong, checkpoint.structures, checkpoint.layout)
    other = {tensor: shape for tensor, shape in shapes.items() if tensor != name}
    last = f"model.layers.{config['num_hidden_layers'] - 1}.mlp.norm.weight"
    for changed in (other, shapes | {last: [64]}):
        with pytest.raises(UserError, match="is not supported"):
            discover(config, changed, "here")
