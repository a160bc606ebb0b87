"""Discovery of experts by names and shapes, and refusals of what doesn't have their form."""

import pytest
from headers import checkpoint_of, grouped_mixtures, mixtures, tensors_of
from hypothesis import given
from hypothesis import strategies as st

from hfprune_dist.checkpoints.checks import check_shapes
from hfprune_dist.checkpoints.discovery import discover
from hfprune_dist.checkpoints.module_tensors import module_tensors
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
    check_shapes(checkpoint.path, checkpoint.tensors, structures, 64)
    owned = [name for kind, it in structures.items() if kind != EXPERTS for name in owned_of(it, checkpoint)]
    mlps = {name for name in checkpoint.tensors if "_proj" in name}
    assert len(owned) == len({*owned}) and {*owned} == mlps


def owned_of(units, checkpoint):
    layers = range(units.num_layers)
    return [name for layer in layers for name, _ in units.in_layer(layer, checkpoint.tensors)]


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
    check_shapes(checkpoint.path, checkpoint.tensors, checkpoint.structures, 64)


@given(grouped_mixtures(), st.data())
def test_a_router_of_another_number_of_experts_is_named(config, data):
    checkpoint = checkpoint_of(config)
    name = data.draw(st.sampled_from(sorted(it for it in checkpoint.tensors if ".gate." in it)))
    info = checkpoint.tensors[name]
    wrong = {**checkpoint.tensors, name: type(info)(**{**vars(info), "shape": (99, *info.shape[1:])})}
    with pytest.raises(UserError, match=name.replace(".", r"\.") + " has shape .*: num_experts"):
        check_shapes(checkpoint.path, wrong, checkpoint.structures, 64)


NO_NUMBERS = st.one_of(st.integers(-3, 0), st.sampled_from([99, True, "a", 1.0, [1]]))


@given(grouped_mixtures(), NO_NUMBERS, st.sampled_from(["num_experts_per_tok", "n_group", "topk_group"]))
def test_what_a_router_cannot_choose_is_refused_with_what_it_can(config, value, key):
    valid = {
        "num_experts_per_tok": f"from 1 to {config['num_experts']}, the number of experts",
        "n_group": f"that divides {config['num_experts']}, the number of experts",
        "topk_group": f"from 1 to {config.get('n_group', 1)}, the number of groups",
    }
    with pytest.raises(UserError) as caught:
        discover(config | {key: value}, tensors_of(config), "here")
    assert str(caught.value) == f"here: {key} must be an integer {valid[key]}, not {value!r}"


@given(grouped_mixtures(), st.sampled_from([None, False]))
def test_groups_that_are_not_stated_are_one(config, value):
    shapes = tensors_of(config)
    family, _ = discover(config | {"n_group": value, "topk_group": value}, shapes, "here")
    assert family.experts.groups == 1
    greedy = config | {"model_type": "deepseek_v2", "n_group": 0, "topk_group": 0}
    assert discover(greedy, shapes, "here")[0].experts.groups == 1, "its router has no use for groups"
    with pytest.raises(UserError, match="here: n_group must be an integer that divides"):
        discover(greedy | {"topk_method": "group_limited_greedy"}, shapes, "here")


@given(grouped_mixtures())
def test_groups_must_have_as_many_as_a_router_takes(config):
    experts = config["num_experts"]
    told = "here: it contradicts itself: .* groups have .* experts each, but a router that takes"
    cases = [{"n_group": experts, "topk_group": 1, "num_experts_per_tok": 2}]
    cases += [{"n_group": experts, "topk_group": experts}] if "n_group" in config else []
    for changes in cases:
        with pytest.raises(UserError, match=told):
            discover(config | changes, tensors_of(config), "here")


@given(mixtures(), st.sampled_from([1, 0, -1, "2"]))
def test_a_mixture_of_one_expert_or_none_is_told(config, number):
    told = {1: "not supported: it is a mixture of one expert .num_experts 1., and pruned are those of two or more"}
    other = f"here: it contradicts the tensors in the weight files: they have experts .*, and num_experts is {number!r}"
    with pytest.raises(UserError, match=told.get(number, other)):
        discover(config | {"num_experts": number}, tensors_of(config | {"num_experts": 1}), "here")


@given(mixtures())
def test_modules_have_the_experts_of_a_layer_in_two_tensors(config):
    checkpoint = checkpoint_of(config)
    made = module_tensors(checkpoint)
    sources = [name for it in made.values() for names in it.sources for name in names]
    assert sorted(sources) == sorted(checkpoint.tensors)
    experts, width = config["num_experts"], config["moe_intermediate_size"]
    last = f"model.layers.{config['num_hidden_layers'] - 1}.mlp.experts"
    assert made[f"{last}.gate_up_proj"].shape == (experts, 2 * width, 64)
    assert made[f"{last}.down_proj"].shape == (experts, 64, width)
    assert {f"{last}.{expert}.up_proj.weight" for expert in range(experts)}.isdisjoint(made)


@given(mixtures(), st.data())
def test_a_tensor_that_is_missing_or_of_another_shape_is_named(config, data):
    shapes = tensors_of(config)
    name = data.draw(st.sampled_from(sorted(it for it in shapes if "experts" in it)))
    if data.draw(st.booleans()):
        checkpoint = checkpoint_of(config)
        info = checkpoint.tensors[name]
        wrong = {**checkpoint.tensors, name: type(info)(**{**vars(info), "shape": (*info.shape[:-1], 63)})}
        with pytest.raises(UserError, match=name.replace(".", r"\.") + " has shape"):
            check_shapes(checkpoint.path, wrong, checkpoint.structures, 64)
    else:
        del shapes[name]
        part = name.partition("layers.")[2].partition(".")[2]
        lacks = f"contradicts the tensors .*: layer .* has no {part}, of {config['num_experts']} experts"
        known = "experts.0." in part or "shared" in part  # these show what kind of experts they are
        with pytest.raises(UserError, match="not supported|has no" if known else lacks):
            discover(config, shapes, "here")


@given(mixtures())
def test_more_experts_than_config_json_says_are_named(config):
    count = config["num_experts"]
    told = rf"contradicts the tensors .*: layer \d+ has mlp\.experts\.{count}\..*, of {count} experts"
    with pytest.raises(UserError, match=told):
        discover(config, tensors_of(config | {"num_experts": count + 1}), "here")


@given(mixtures(), st.sampled_from(["mlp.norm.weight", "mlp.gate_proj.weight"]))
def test_what_is_there_besides_is_named(config, part):
    last = config["num_hidden_layers"] - 1
    shapes = tensors_of(config) | {f"model.layers.{last}.{part}": [64]}
    with pytest.raises(UserError, match=f"in layer {last}, {part} is not part of experts of a known kind"):
        discover(config, shapes, "here")


@given(mixtures())
def test_config_json_must_agree_with_itself(config):
    cases = {
        "it contradicts itself: num_experts is .* and n_routed_experts is": {
            "n_routed_experts": config["num_experts"] + 1
        },
        "num_experts_per_tok must be an integer from 1 to .*, not None": {"num_experts_per_tok": None},
    }
    if "n_shared_experts" in config:
        told = "contradicts the tensors .*: they have mlp.shared_experts, and none of .* says how wide it is"
        cases |= {told: {"n_shared_experts": None}}
    for why, changes in cases.items():
        with pytest.raises(UserError, match=why):
            discover(config | changes, tensors_of(config), "here")


@given(mixtures())
def test_all_that_config_json_says_of_experts_widths_follows(config):
    """Some classes read intermediate_size for the width, whatever else a file says."""
    both = {**config, "intermediate_size": config["moe_intermediate_size"]}
    fields = {"moe_intermediate_size"} | ({"intermediate_size"} if not config["first_k_dense_replace"] else set())
    assert checkpoint_of(both).structures[EXPERT_NEURONS].fields.keys() == fields


@given(mixtures())
def test_layers_that_predict_further_tokens_are_left_out(config):
    shapes = tensors_of(config)
    further = {
        name.replace("layers.0.", f"layers.{config['num_hidden_layers']}."): shape
        for name, shape in shapes.items()
        if "layers.0." in name
    }
    family, stated = discover(config | {"num_nextn_predict_layers": 1}, shapes | further, "here")
    assert stated["num_nextn_predict_layers"] == 0 and family.found == frozenset(shapes)
