"""Settings of single layers stay with their layers."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import some
from transformers import Gemma4TextConfig, Qwen2Config, Qwen3Config

from hfprune_dist.checkpoints.layer_settings import renumbered, undroppable_layers


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
    changed = config | renumbered(config, layers)
    assert changed["num_hidden_layers"] == len(layers)
    assert config_class(**changed).layer_types == [before[layer] for layer in layers]


@pytest.mark.parametrize(
    ("config", "stays", "why"),
    [
        ({"full_attention_interval": 4}, [0, 1, 2, 3], "full_attention_interval 4"),
        ({"model_type": "gemma2"}, [0, 1, 2, 3], "gemma2 without layer_types"),
        ({"attn_layer_period": 3}, [0, 1, 2, 3], "attn_layer_period 3"),
        ({"num_hidden_layers": 1}, [0], "only one"),
        ({"layer_types": ["full_attention", "linear_attention", "sliding_attention", "linear_attention"]}, [2], ""),
        ({"layer_types": ["conv", "attention", "full_attention", "mamba"]}, [2], ""),
        ({"full_attn_idxs": [2, 9]}, [2], ""),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, [], ""),
        ({"layer_types": ["linear_attention"] * 4}, [], ""),
        ({"max_window_layers": 2}, [], ""),
        ({"no_rope_layer_interval": 2, "no_rope_layers": [1, 0, 1, 0]}, [], ""),
    ],
)
def test_layers_that_others_are_told_by_and_one_with_attention_stay(config, stays, why):
    reasons = undroppable_layers({"num_hidden_layers": 4, **config})
    assert list(reasons) == stays and all(why in reason for reason in reasons.values())


def test_a_last_layer_that_always_has_full_attention_stays():
    config = Gemma4TextConfig(num_hidden_layers=4, layer_types=["sliding_attention", "full_attention"] * 2).to_dict()
    assert list(undroppable_layers(config)) == [3]
    assert Gemma4TextConfig(**config | renumbered(config, [2, 3])).layer_types == config["layer_types"][2:]
    assert renumbered({"num_hidden_layers": 2, "no_rope_layers": [1, 0]}, [1])["no_rope_layers"] == [0]
