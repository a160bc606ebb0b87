"""Settings of single layers stay with their layers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import some
from transformers import Gemma4TextConfig, JambaConfig, Qwen2Config, Qwen3Config

from hfprune_dist.checkpoints.layer_settings import of_layers, undroppable_layers


@settings(max_examples=50)
@given(st.data())
def test_layers_keep_the_kind_that_they_had(data):
    count = data.draw(st.integers(1, 6))
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": data.draw(st.integers(0, 8))}
    config = {"num_hidden_layers": count, **window}
    config_class = data.draw(st.sampled_from([Qwen2Config, Qwen3Config]))
    before = config_class(**config).layer_types
    if data.draw(st.booleans()):
        config["layer_types"] = before = data.draw(st.permutations(before))
    layers = some(data.draw, count)
    changed = config | of_layers(config, layers)
    assert changed["num_hidden_layers"] == len(layers)
    assert config_class(**changed).layer_types == [before[layer] for layer in layers]


@pytest.mark.parametrize(
    ("config", "why"),
    [
        ({"full_attention_interval": 4}, "full_attention_interval 4"),
        ({"model_type": "gemma2"}, "gemma2 without layer_types"),
        ({"attn_layer_period": 3}, "attn_layer_period 3"),
        ({"num_hidden_layers": 1}, "only one"),
    ],
)
def test_layers_that_others_are_told_by_stay(config, why):
    config = {"num_hidden_layers": 4, **config}
    reasons = undroppable_layers(config)
    assert list(reasons) == list(range(config["num_hidden_layers"]))
    assert all(why in reason for reason in reasons.values())


def test_a_last_layer_that_always_has_full_attention_stays():
    config = Gemma4TextConfig(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2).to_dict()
    assert list(undroppable_layers(config)) == [3]
    assert Gemma4TextConfig(**config | of_layers(config, [2, 3])).layer_types == config["layer_types"][2:]


@pytest.mark.parametrize(
    "kinds",
    [
        {"layer_types": ["full_attention", "linear_attention", "sliding_attention", "linear_attention"]},
        {"layer_types": ["conv", "attention", "full_attention", "mamba"]},
        {"full_attn_idxs": [2, 9]},
    ],
)
def test_one_layer_with_attention_stays_where_others_have_none(kinds):
    assert list(undroppable_layers({"num_hidden_layers": 4, **kinds})) == [2]


def test_all_other_layers_can_be_dropped():
    assert undroppable_layers({"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]}) == {}
    assert undroppable_layers({"num_hidden_layers": 2, "layer_types": ["linear_attention"] * 2}) == {}
    assert undroppable_layers({"num_hidden_layers": 3, "max_window_layers": 2}) == {}
    listed = {"num_hidden_layers": 2, "no_rope_layer_interval": 2, "no_rope_layers": [1, 0]}
    assert undroppable_layers(listed) == {}
    assert of_layers(listed, [1])["no_rope_layers"] == [0]


PERIODS = {"expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 4, "attn_layer_offset": 2}


def has_experts(config, layer):
    """Return what classes of transformers make of these settings."""
    last = config.get("moe_layer_end_index", -1)
    if kinds := config.get("mlp_layer_types"):
        return kinds[layer] == "sparse"
    if layer in config.get("mlp_only_layers", ()) or 0 <= last < layer:
        return False
    if period := config.get("expert_layer_period"):
        return layer % period == config["expert_layer_offset"]
    steps = [config.get(key, 1) for key in ("decoder_sparse_step", "moe_layer_interval")]
    firsts = [config.get(key, 0) for key in ("first_k_dense_replace", "num_dense_layers", "moe_layer_start_index")]
    return all((layer + 1) % step == 0 for step in steps) and layer >= max(firsts)


@pytest.mark.parametrize(
    "settings",
    [
        PERIODS,
        {"moe_layer_start_index": 1, "moe_layer_end_index": 4, "moe_layer_interval": 2},
        {"num_dense_layers": 2},
        {"first_k_dense_replace": 3},
        {"mlp_only_layers": [0, 4], "decoder_sparse_step": 2},
        {"decoder_sparse_step": 3},
        {"mlp_layer_types": ["dense", "sparse", "sparse", "dense", "sparse", "dense"]},
    ],
)
def test_a_layer_alone_has_experts_where_it_had_them(settings):
    config = {"num_hidden_layers": 6, **settings}
    alone = [{**config, **of_layers(config, [layer])} for layer in range(6)]
    assert [has_experts(settings, 0) for settings in alone] == [has_experts(config, layer) for layer in range(6)]
    assert {has_experts(config, layer) for layer in range(6)} == {False, True}


def test_a_layer_alone_has_attention_where_it_had_it():
    config = {"num_hidden_layers": 6, "num_experts": 2, **PERIODS}
    kinds = [JambaConfig(**config | of_layers(config, [layer])).layers_block_type for layer in range(6)]
    assert [kind for (kind,) in kinds] == JambaConfig(**config).layers_block_type
