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
    shapes = {f"model.layers.{number}.{name}.weight": shape for number in range(2) for name, shape in layer.items()}
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
    ("layer", "outside", "changes", "expected"),
    [
        (without("mlp.up_proj"), {}, {}, "its layers have no MLP of a kind that is known (they have mlp.down_proj"),
        (LAYER | {"mlp.sub_norm": [12]}, {}, {}, "in layer 0, mlp.sub_norm.weight is not part of a plain MLP"),
        (LAYER, {"model__wpe__weight": [64, 8]}, {}, "beside its layers it has model.wpe.weight"),
        (LAYER, {}, {"num_hidden_layers": 4}, "layers.<number>: it has model.layers (model.layers.2 is missing)"),
        (LAYER, {}, {"num_kv_shared_layers": 1}, "its last 1 layers read keys"),
        (LAYER, {}, {"architectures": ["NewModel"]}, "architectures is 'NewModel'"),
        (LAYER, {}, {"n_routed_experts": 4, "num_experts_per_tok": 2}, "(n_routed_experts) of a kind that isn't known"),
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


def test_config_json_alone_may_rule_a_model_out():
    for changes, told in (
        ({"is_causal": False}, r"\(is_causal\)"),
        ({"model_type": None}, "must name an architecture"),
    ):
        with pytest.raises(UserError, match=told):
            refuse_other_kinds(CONFIG | changes, "here")
