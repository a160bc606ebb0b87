"""Discovery of parts by names and shapes in architectures that aren't listed, and refusals that name the cause."""

import pytest

from hfprune_dist.checkpoints.discovery import discover
from hfprune_dist.checkpoints.families import refuse_other_kinds
from hfprune_dist.errors import UserError

CONFIG = {
    "model_type": "new",
    "architectures": ["NewForCausalLM"],
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "vocab_size": 20,
}
LAYER = {
    "self_attn.q_proj": [8, 8],
    "self_attn.k_proj": [4, 8],
    "self_attn.v_proj": [4, 8],
    "self_attn.o_proj": [8, 8],
    "mlp.gate_proj": [12, 8],
    "mlp.up_proj": [12, 8],
    "mlp.down_proj": [8, 12],
    "input_layernorm": [8],
    "post_attention_layernorm": [8],
}


def shapes_of(layer=LAYER, **outside):
    shapes = {f"model.layers.{number}.{name}.weight": it for number in range(2) for name, it in layer.items()}
    named = {name.replace("__", "."): shape for name, shape in outside.items()}
    return {"model.embed_tokens.weight": [20, 8], "model.norm.weight": [8], **shapes, **named}


def found(layer=LAYER, config=CONFIG, **outside):
    return discover(config, shapes_of(layer, **outside), "here")


def without(*names):
    return {name: shape for name, shape in LAYER.items() if name not in names}


def refusal(*args, **options):
    with pytest.raises(UserError, match=r"here: model_type 'new' is not supported: ") as caught:
        found(*args, **options)
    return str(caught.value)


@pytest.mark.parametrize("stack", ["transformer.h", "model.blocks", "layers_0", "model.mtp.layers"])
def test_layers_under_another_name_are_refused_with_a_name_that_is_there(stack):
    names = [f"{stack}.{number}.mlp.down_proj.weight" for number in range(2)]
    with pytest.raises(UserError, match=r"not supported: no tensor is of a layer called layers\.<number>") as refused:
        discover(CONFIG, {name: [8, 12] for name in ["lm_head.weight", *names]}, "here")
    assert f"(there is, for example, {names[0]})" in str(refused.value)


def test_shapes_say_what_config_json_does_not():
    family, stated = found()
    assert stated == {"num_key_value_heads": 2, "tie_word_embeddings": True}
    assert family.structures(CONFIG | stated)["kv_groups"].counts == (2, 2)
    assert family.tensors(CONFIG) == {*shapes_of(), "lm_head.weight"}
    family, stated = found(lm_head__weight=[20, 8], model__layers__2__mlp__up_proj__weight=[12, 8])
    assert stated["tie_word_embeddings"] is False
    assert family.tensors(CONFIG) == {*shapes_of(), "lm_head.weight"}, "layers beyond the last are no part of it"
    assert found(config=CONFIG | {"num_key_value_heads": 2, "tie_word_embeddings": False})[1] == {}


def test_blocks_that_predict_further_tokens_are_no_part_of_it():
    further = {f"model__mtp__layers__{number}__mlp__up_proj__weight": [12, 8] for number in range(2)}
    family, _ = found(model__mtp_emb_norm__0__weight=[8], **further)
    assert family.tensors(CONFIG) == {*shapes_of(), "lm_head.weight"} and family.layers == "model.layers"


@pytest.mark.parametrize("buffer", ["self_attn.rotary_emb.inv_freq", "attention.bias", "attention.masked_bias"])
@pytest.mark.parametrize("where", ["model", "model.layers.0", "model.layers.1"])
def test_buffers_that_older_files_hold_change_nothing(where, buffer):
    expected = found()
    assert found(**{f"{where}.{buffer}": [1]}) == expected and expected[0].whole_groups == ""


def test_gate_and_up_in_one_matrix_are_two_parts_of_it():
    family, _ = found(without("mlp.gate_proj", "mlp.up_proj") | {"mlp.gate_up_proj": [24, 8]})
    units = family.units(CONFIG)
    assert units.row_parts == [2] and units.owned[0].entries == 2
    shapes = shapes_of(without("mlp.gate_proj", "mlp.up_proj") | {"mlp.gate_up_proj": [24, 8]})
    assert units.parameters_per_unit(shapes) == 3 * 8


@pytest.mark.parametrize(
    ("rows", "down"), [("mlp.up_proj", "mlp.down_proj"), ("mlp.c_fc", "mlp.c_proj"), ("fc1", "fc2")], ids=str
)
def test_an_mlp_may_have_no_gate_and_be_no_module_of_its_own(rows, down):
    layer = without("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj") | {rows: [12, 8], down: [8, 12]}
    family, _ = found(layer)
    units = family.units(CONFIG)
    assert units.row_parts == [1] and units.output == down
    assert units.parameters_per_unit(shapes_of(layer)) == 2 * 8
    assert family.no_sequence == ("" if rows.startswith("mlp.") else "its MLP is no module of its own")


def test_an_activation_may_learn():
    numbers = {f"model.layers.{layer}.mlp.act_fn.alpha": [1] for layer in range(2)}
    family, _ = discover(CONFIG, shapes_of() | numbers, "here")
    assert numbers.keys() <= family.tensors(CONFIG)
    with pytest.raises(UserError, match=r"mlp\.act_fn\.alpha is not part of a plain MLP"):
        discover(CONFIG, shapes_of() | {key: [12] for key in numbers}, "here")


def test_the_head_and_positions_beside_the_layers_are_found():
    family, stated = found(embed_out__weight=[20, 8], model__embed_positions__weight=[66, 8])
    assert family.head == "embed_out" and stated["tie_word_embeddings"] is False
    assert "model.embed_positions.weight" in family.tensors(CONFIG)
    assert "word_embed_proj_dim 4" in refusal(config=CONFIG | {"word_embed_proj_dim": 4})


@pytest.mark.parametrize(
    ("layer", "outside", "expected"),
    [
        (without("mlp.up_proj"), {}, "its layers have no MLP of a kind that is known (they have mlp.down_proj"),
        (LAYER | {"mlp.sub_norm": [12]}, {}, "in layer 0, mlp.sub_norm.weight is not part of a plain MLP"),
        (LAYER | {"mlp.gate_proj": [11, 8]}, {}, "mlp.gate_proj.weight of layer 0 has shape [11, 8], not [12, 8]"),
        (LAYER, {"model__wpe__weight": [64, 8]}, "beside its layers it has model.wpe.weight"),
        (LAYER, {"model__other_norm__weight": [8]}, "it doesn't have exactly one norm with a weight after its layers"),
        (
            LAYER,
            {"model__embed_tokens__weight": [21, 8], "model__wte__weight": [22, 8]},
            "it doesn't have exactly one table of embeddings of shape [20, 8]",
        ),
    ],
    ids=str,
)
def test_what_is_missing_or_there_besides_is_named(layer, outside, expected):
    assert expected in refusal(layer, **outside)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 4}, "num_hidden_layers is 4, and they have no model.layers.2"),
        *(
            ({key: wrong}, f"embed_tokens.weight has shape [20, 8], but vocab_size and hidden_size are {sizes}")
            for key, wrong, sizes in (("hidden_size", 16, [20, 16]), ("vocab_size", 24, [24, 8]))
        ),
    ],
)
def test_sizes_that_are_not_those_of_the_tensors_are_told_as_such(changes, told):
    with pytest.raises(UserError) as caught:
        found(config=CONFIG | changes)
    assert str(caught.value).startswith("here: it contradicts the tensors in the weight files: ")
    assert told in str(caught.value)


def test_a_layer_without_what_the_others_have_is_named():
    shapes = shapes_of()
    del shapes["model.layers.1.mlp.up_proj.weight"]
    with pytest.raises(UserError, match=r"layer 1 has no mlp\.up_proj\.weight, which layer 0 has"):
        discover(CONFIG, shapes, "here")


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "minimax_m3_vl_text"])
@pytest.mark.parametrize("without", [0, 1])
def test_a_layer_for_which_another_chooses_keys_is_refused_where_it_would_attend_to_all_elsewhere(model_type, without):
    config, shapes = CONFIG | {"model_type": model_type}, shapes_of(LAYER | {"self_attn.indexer.q_proj": [8, 8]})
    discover(config, shapes, "here")
    del shapes[f"model.layers.{without}.self_attn.indexer.q_proj.weight"]
    if model_type != "glm_moe_dsa":
        discover(config, shapes, "here")
        return
    with pytest.raises(UserError, match=rf"layer {without} attends to keys that an earlier one chose"):
        discover(config, shapes, "here")


def test_config_json_alone_may_rule_a_model_out():
    assert "its last 1 layers read keys" in refusal(config=CONFIG | {"num_kv_shared_layers": 1})
    assert "architectures is 'NewModel'" in refusal(config=CONFIG | {"architectures": ["NewModel"]})
    assert "a mixture of experts of a kind that isn't known" in refusal(config=CONFIG | {"n_routed_experts": 4})
    with pytest.raises(UserError, match="sound and text"):
        refuse_other_kinds(CONFIG | {"audio_config": {}}, "here")


@pytest.mark.parametrize(
    ("key", "ahead", "not_ahead"),
    [("is_causal", [False], [True, None]), ("use_bidirectional_attention", [True, "all"], [False, "vision", None])],
)
def test_a_model_whose_tokens_see_those_that_follow_is_refused(key, ahead, not_ahead):
    for model_type in ("llama", "gemma3_text"):
        for value in ahead:
            with pytest.raises(UserError, match=rf"its tokens see those that follow \({key} {value!r}\)"):
                refuse_other_kinds(CONFIG | {"model_type": model_type, key: value}, "here")
        for value in not_ahead:
            refuse_other_kinds(CONFIG | {"model_type": model_type, key: value}, "here")


def test_a_config_without_a_type_is_refused():
    for told in ({}, {"model_type": None}, {"model_type": ["llama"]}):
        with pytest.raises(UserError, match=r"here: model_type is .*; it must name an architecture"):
            refuse_other_kinds({key: it for key, it in CONFIG.items() if key != "model_type"} | told, "here")


REFUSED = (
    *("gpt2", "falcon_h1", "olmo_hybrid", "nemotron_h", "zamba2", "recurrent_gemma", "llama4_text", "jetmoe", "beam"),
    *("diffllama", "minicpm3", "lara_mini", "sarvam_moe", "axk2", "deepseek_v4", "hy_v4", "inkling_text"),
    "gemma3n_text",
)


@pytest.mark.parametrize("model_type", REFUSED)
def test_some_are_refused_by_their_type_whatever_else_they_say(model_type):
    with pytest.raises(UserError, match=f"'{model_type}' is not supported: [a-zV, '-]*") as caught:
        refuse_other_kinds(CONFIG | {"model_type": model_type, "n_routed_experts": 4}, "here")
    assert "mixture" not in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (without("self_attn.q_proj") | {"self_attn.kv_a_proj_with_mqa": [6, 8]}, "one latent vector for all heads"),
        (without("self_attn.q_proj") | {"self_attn.qkv_proj": [16, 8]}, "queries, keys and values are one matrix"),
        (LAYER | {"self_attn.q_norm": [8]}, "self_attn.q_norm.weight has something of all heads"),
        (LAYER | {"self_attn.gate_proj": [8, 8]}, "self_attn.gate_proj.weight has something of all heads"),
    ],
    ids=str,
)
def test_where_kv_groups_cannot_go_neurons_can(layer, why):
    family, stated = found(layer)
    assert why in family.whole_groups
    structures = family.structures(CONFIG | stated)
    assert structures["kv_groups"].fields == {} and structures["kv_groups"].parameters_per_unit(shapes_of(layer)) == 0
    assert structures["neurons"].counts == (12, 12)


@pytest.mark.parametrize(
    ("norms", "why"),
    [
        (["input_layernorm"], "its attention and its MLP read the same hidden states"),
        (["norm1", "norm2"], "what its norms do isn't known (norm1, norm2)"),
        ([], "they differ, or have no weights"),
    ],
)
def test_where_norms_say_too_little_blocks_are_not_refitted_one_after_another(norms, why):
    family, _ = found(without("input_layernorm", "post_attention_layernorm") | {key: [8] for key in norms})
    assert why in family.no_sequence


def test_norms_may_come_before_blocks_after_them_or_both():
    norms = ["post_attention_layernorm", "post_feedforward_layernorm"]
    family, _ = found(without("input_layernorm") | {key: [8] for key in norms})
    assert (family.mlp_norm, family.mlp_norm_after) == (None, "post_feedforward_layernorm")
    assert family.units(CONFIG).block.reader == "mlp"
    more = ["input_layernorm", *norms, "pre_feedforward_layernorm"]
    family, _ = found(LAYER | {key: [8] for key in more})
    assert (family.mlp_norm, family.mlp_norm_after) == ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    assert (family.attention_norm, family.attention_norm_after) == ("input_layernorm", "post_attention_layernorm")
