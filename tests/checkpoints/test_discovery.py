"""Discovery of parts by names and shapes, and refusals that name the cause."""

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


def test_shapes_say_what_config_json_does_not():
    family, stated = found()
    assert stated == {"num_key_value_heads": 2, "tie_word_embeddings": True}
    assert family.structures(CONFIG | stated)["kv_groups"].counts == (2, 2)
    assert family.tensors == {*shapes_of(), "lm_head.weight"}
    family, stated = found(lm_head__weight=[20, 8], model__layers__2__mlp__up_proj__weight=[12, 8])
    assert stated["tie_word_embeddings"] is False
    assert family.tensors == {*shapes_of(), "lm_head.weight"}, "layers beyond the last are no part of it"
    assert found(config=CONFIG | {"num_key_value_heads": 2, "tie_word_embeddings": False})[1] == {}


def test_blocks_that_predict_further_tokens_and_buffers_are_no_part_of_it():
    further = {f"model__mtp__layers__{number}__mlp__up_proj__weight": [12, 8] for number in range(2)}
    family, _ = found(model__mtp_emb_norm__0__weight=[8], **further)
    assert family.tensors == {*shapes_of(), "lm_head.weight"} and family.layers == "model.layers"
    assert found(**{"model.layers.1.attention.masked_bias": [1], "model.rotary_emb.inv_freq": [1]}) == found()


@pytest.mark.parametrize(
    ("rows", "down"), [("mlp.up_proj", "mlp.down_proj"), ("mlp.c_fc", "mlp.c_proj"), ("fc1", "fc2")], ids=str
)
def test_an_mlp_may_have_no_gate_and_be_no_module_of_its_own(rows, down):
    layer = without("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj") | {rows: [12, 8], down: [8, 12]}
    family, _ = found(layer)
    units = family.units(CONFIG)
    assert units.row_parts == [1] and units.output == down
    assert family.no_sequence == ("" if rows.startswith("mlp.") else "its MLP is no module of its own")


def test_an_activation_may_learn():
    numbers = {f"model.layers.{layer}.mlp.act_fn.alpha": [1] for layer in range(2)}
    assert numbers.keys() <= discover(CONFIG, shapes_of() | numbers, "here")[0].tensors
    with pytest.raises(UserError, match=r"mlp\.act_fn\.alpha is not part of a plain MLP"):
        discover(CONFIG, shapes_of() | {key: [12] for key in numbers}, "here")


def test_the_head_and_positions_beside_the_layers_are_found():
    family, stated = found(embed_out__weight=[20, 8], model__embed_positions__weight=[66, 8])
    assert family.head == "embed_out" and stated["tie_word_embeddings"] is False
    assert "model.embed_positions.weight" in family.tensors and not family.keeps_apart


@pytest.mark.parametrize(
    ("layer", "outside", "changes", "expected"),
    [
        (without("mlp.up_proj"), {}, {}, "its layers have no MLP of a kind that is known (they have mlp.down_proj"),
        (LAYER | {"mlp.sub_norm": [12]}, {}, {}, "in layer 0, mlp.sub_norm.weight is not part of a plain MLP"),
        (LAYER, {"model__wpe__weight": [64, 8]}, {}, "beside its layers it has model.wpe.weight"),
        (LAYER, {"model__other_norm__weight": [8]}, {}, "exactly one norm of [8] after its layers"),
        (LAYER, {}, {"num_hidden_layers": 4}, "num_hidden_layers is 4, but model.layers.2 is missing"),
        (LAYER, {}, {"vocab_size": 24}, "[24, 8] (tables: model.embed_tokens.weight [20, 8])"),
        (LAYER, {}, {"num_kv_shared_layers": 1}, "its last 1 layers read keys"),
        (LAYER, {}, {"architectures": ["NewModel"]}, "architectures is 'NewModel'"),
        (
            LAYER,
            {},
            {"n_routed_experts": 4, "num_experts_per_tok": 2},
            "a mixture of experts (n_routed_experts) of a kind that isn't known",
        ),
    ],
    ids=str,
)
def test_what_is_missing_or_there_besides_is_named(layer, outside, changes, expected):
    assert expected in refusal(layer, CONFIG | changes, **outside)


def test_a_layer_without_what_the_others_of_its_kind_have_is_named():
    shapes = shapes_of(LAYER | {"self_attn.q_norm": [2]})
    del shapes["model.layers.1.self_attn.q_norm.weight"]
    with pytest.raises(UserError, match=r"tensor self_attn\.q_norm\.weight of layer 1, which layer 0 has, is missing"):
        discover(CONFIG, shapes, "here")
    discover(CONFIG | {"layer_types": ["full_attention", "sliding_attention"]}, shapes, "here")


@pytest.mark.parametrize("model_type", ["glm_moe_dsa", "minimax_m3_vl_text"])
def test_a_layer_for_which_another_chooses_keys_is_refused_where_it_would_attend_to_all_elsewhere(model_type):
    config, shapes = CONFIG | {"model_type": model_type}, shapes_of(LAYER | {"self_attn.indexer.q_proj": [8, 8]})
    del shapes["model.layers.1.self_attn.indexer.q_proj.weight"]
    if model_type != "glm_moe_dsa":
        discover(config, shapes, "here")
        return
    with pytest.raises(UserError, match=r"self_attn\.indexer\.q_proj\.weight of layer 1"):
        discover(config, shapes, "here")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"is_causal": False}, "its tokens see those that follow (is_causal False)"),
        (
            {"use_bidirectional_attention": "all"},
            "its tokens see those that follow (use_bidirectional_attention 'all')",
        ),
        ({"model_type": None}, "model_type is None; it must name an architecture"),
        ({"model_type": "gpt2"}, "'gpt2' is not supported: its matrices are transposed (Conv1D)"),
        ({"audio_config": {}}, "it is a model of sound and text (audio_config)"),
    ],
)
def test_config_json_alone_may_rule_a_model_out(changes, told):
    with pytest.raises(UserError) as caught:
        refuse_other_kinds(CONFIG | changes, "here")
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        (without("self_attn.q_proj") | {"self_attn.kv_a_proj_with_mqa": [6, 8]}, "one latent vector for all heads"),
        (without("self_attn.q_proj") | {"self_attn.qkv_proj": [16, 8]}, "queries, keys and values are one matrix"),
        (LAYER | {"self_attn.q_norm": [8]}, "self_attn.q_norm.weight has something of all heads"),
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
    more = ["input_layernorm", *norms, "pre_feedforward_layernorm"]
    family, _ = found(LAYER | {key: [8] for key in more})
    assert (family.mlp_norm, family.mlp_norm_after) == ("pre_feedforward_layernorm", "post_feedforward_layernorm")
    assert (family.attention_norm, family.attention_norm_after) == ("input_layernorm", "post_attention_layernorm")
