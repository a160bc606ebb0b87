"""What the table says of engines: as they were run, and as their sources have it."""

import pytest

from hfprune_dist.checkpoints.engines import ENGINES, fit

LLAMA = {"model_type": "llama", "hidden_size": 32, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 4}
QWEN2 = LLAMA | {"model_type": "qwen2"}
FEWER = {"num_attention_heads": 6, "num_key_value_heads": 3}
WIDTHS = {"layer_sizes": {"intermediate_size": [3, 4]}}
HEADS = {"layer_sizes": {"num_attention_heads": [8, 6], "num_key_value_heads": [4, 3], "intermediate_size": [3, 4]}}
EVERY = {*ENGINES}


@pytest.mark.parametrize(
    ("config", "loading"),
    [
        (LLAMA, EVERY),
        (QWEN2, EVERY),
        (LLAMA | FEWER, EVERY - {"ctranslate2"}),
        (QWEN2 | FEWER, EVERY - {"mlx", "ctranslate2"}),
        (LLAMA | FEWER | {"model_type": "mistral"}, EVERY),
        (LLAMA | WIDTHS, {"vllm", "llama.cpp", "openvino"}),
        (LLAMA | HEADS, {"vllm", "llama.cpp"}),
        (QWEN2 | WIDTHS, {"vllm", "llama.cpp", "openvino"}),
        (QWEN2 | HEADS, {"vllm", "llama.cpp"}),
        (LLAMA | {"output_biases": ["mlp.down_proj"]}, {"llama.cpp"}),
        (LLAMA | {"layer_sizes": {"q_proj_rank": [2, 2]}}, set()),
        (LLAMA | {"model_type": "doge"}, EVERY - {"llama.cpp"}),
        ({"model_type": "gemma3", "text_config": LLAMA}, EVERY - {"llama.cpp"}),
        ({"model_type": "bloom", "n_head": 8, "n_embed": 32}, EVERY - {"llama.cpp"}),
    ],
)
def test_what_each_engine_loads(config, loading):
    found = {name: fit(name, config) for name in ENGINES}
    assert {name for name, one in found.items() if one.loads} == loading
    assert all(one.told for one in found.values() if not one.loads)


def test_the_way_round_is_named():
    assert fit("vllm", QWEN2 | FEWER).options == {"model_impl": "transformers"}
    assert fit("vllm", LLAMA | HEADS).told == "trust_remote_code=True" and "export" in fit("llama.cpp", LLAMA).told
    assert "keeps KV groups" in fit("mlx", QWEN2 | FEWER).told
    assert "leaves heads alike" in fit("openvino", LLAMA | HEADS).told
