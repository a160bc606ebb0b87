"""Settings of layers follow them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import some
from transformers import Qwen2Config, Qwen3Config

from hfprune_dist.checkpoints.layer_settings import of_layers, undroppable_layers


@settings(max_examples=50, deadline=None, derandomize=True)
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
        ({"no_rope_layer_interval": 2}, "has no no_rope_layers"),
        ({"num_kv_shared_layers": 3}, "last 3 layers"),
        ({"num_hidden_layers": 1}, "only one"),
    ],
)
def test_layers_that_others_are_told_by_stay(config, why):
    config = {"num_hidden_layers": 4, **config}
    reasons = undroppable_layers(config)
    assert list(reasons) == list(range(config["num_hidden_layers"]))
    assert all(why in reason for reason in reasons.values())


def test_all_other_layers_can_be_dropped():
    assert undroppable_layers({"num_hidden_layers": 3, "max_window_layers": 2}) == {}
    listed = {"num_hidden_layers": 2, "no_rope_layer_interval": 2, "no_rope_layers": [1, 0]}
    assert undroppable_layers(listed) == {}
    assert of_layers(listed, [1])["no_rope_layers"] == [0]
