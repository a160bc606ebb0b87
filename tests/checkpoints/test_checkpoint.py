import json
import struct

import pytest
from safetensors.torch import load_file, save_file
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.safetensors_header import read_safetensors_header
from hfprune_dist.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model")


def edit_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def refusal(folder):
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def test_a_whole_checkpoint_opens(folder):
    checkpoint = open_checkpoint(folder)
    assert (checkpoint.num_layers, checkpoint.units.counts) == (2, (48, 48))
    assert checkpoint.parameters_per_unit == 3 * 32


def test_biases_belong_to_their_neurons(tmp_path):
    assert open_checkpoint(save_tiny(tmp_path / "m", "llama-tied-biases")).parameters_per_unit == 3 * 32 + 2


def test_an_unknown_family_lists_the_known_ones(folder):
    edit_config(folder, model_type="mamba")
    config = json.loads((folder / "config.json").read_text())
    del config["intermediate_size"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "'mamba'" in refusal(folder) and "llama, mistral, qwen2, qwen3" in refusal(folder)
    assert "config.json has no intermediate_size" in refusal(folder)


def test_missing_pieces_are_named(folder, tmp_path):
    assert "no such folder" in refusal(tmp_path / "nowhere")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    assert "no tokenizer" in refusal(folder)
    (folder / "config.json").unlink()
    assert "config.json" in refusal(folder)


def test_missing_weights(folder):
    (folder / "model.safetensors").unlink()
    assert "only safetensors" in refusal(folder)


def test_a_missing_shard_is_named(tmp_path):
    folder = save_tiny(tmp_path / "m", shard_size="20KB")
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert victim.name in refusal(folder) and "missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 20_000])
def test_truncated_weights(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in refusal(folder)


def test_a_header_that_announces_nonsense(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(UserError, match="header is damaged"):
        read_safetensors_header(file)


def test_config_and_weights_must_agree(folder):
    edit_config(folder, intermediate_size=64)
    assert "intermediate_size 64" in refusal(folder)


def test_quantized_weights_are_refused(folder):
    edit_config(folder, quantization_config={"quant_method": "awq"})
    assert "quantized" in refusal(folder)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.1.input_layernorm.weight",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_tensor_that_transformers_would_make_up_is_named(folder, name):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file)
    assert f"tensor {name} is missing" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 7}, "vocab_size and hidden_size [7, 32]"),
        ({"hidden_size": 16}, "vocab_size and hidden_size"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be a positive integer, not 0"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, not True"),
        ({"num_hidden_layers": 3}, "layers.2"),
        ({"layer_sizes": [1]}, "layer_sizes must give a list of 2 numbers"),
        ({"layer_sizes": {"intermediate_size": [48]}}, "layer_sizes must give a list of 2 numbers"),
        (
            {"layer_sizes": {"intermediate_size": [48, 0]}},
            "intermediate_size in layer_sizes must be a positive integer",
        ),
        ({"layer_sizes": {"intermediate_size": [48, 47]}}, "intermediate_size 47 for this layer"),
        ({"output_biases": "mlp.down_proj"}, "must be a list of some of mlp.down_proj, self_attn.o_proj, not 'mlp"),
        ({"output_biases": ["mlp.up_proj"]}, "must be a list of some of mlp.down_proj, self_attn.o_proj, not ['mlp"),
        ({"output_biases": [["mlp.down_proj"]]}, "output_biases must be a list of some of mlp.down_proj"),
        ({"output_biases": ["mlp.down_proj"] * 2}, "output_biases must be a list of some of mlp.down_proj"),
        ({"output_biases": None}, "output_biases must be a list of some of mlp.down_proj"),
        ({"output_biases": ["mlp.down_proj"]}, "layers.0.mlp.down_proj.bias (and 1 more) is missing"),
        ({"head_dim": 16}, "self_attn.q_proj.weight has shape [32, 32], but config.json makes it [64, 32]"),
        ({"num_key_value_heads": 1}, "num_attention_heads 4 and num_key_value_heads 1 for this layer"),
    ],
)
def test_a_config_that_is_not_the_weights_own(folder, changes, expected):
    edit_config(folder, **changes)
    assert expected in refusal(folder)


@pytest.mark.parametrize("header", [b"null", b"[]", b'{"a":1}', b'{"a":{"dtype":"F32","shape":[1]}}'])
def test_a_header_of_something_else(folder, header):
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header)
    assert "header is not that of a safetensors file" in refusal(folder)


@pytest.mark.parametrize("weight_map", [None, ["model.safetensors"], {"model.norm.weight": 1}])
def test_an_index_of_something_else(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert "weight_map" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({}, 512),
        ({"max_position_embeddings": None}, None),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}}, 512),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}, 1024),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 256}}, 512),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4}}, 2048),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": None}}, 512),
    ],
)
def test_positions_as_a_rope_scaling_stretches_them(folder, changes, positions):
    edit_config(folder, **changes)
    assert open_checkpoint(folder).max_positions == positions


@pytest.mark.parametrize("key", ["logits_scaling", "logit_scale", "lm_head_multiplier", "final_logit_softcapping"])
def test_what_changes_the_logits_after_the_head_is_refused(folder, key):
    edit_config(folder, **{key: 30.0})
    assert refusal(folder).endswith(f"{key} 30.0 changes the logits, which its architecture doesn't do")
    edit_config(folder, **{key: None if key.startswith("final") else 1.0})
    assert open_checkpoint(folder)


@pytest.mark.parametrize(("method", "how"), [("mxfp4", "Mxfp4Config(dequantize=True)"), ("awq", "the unquantized")])
def test_quantized_weights_are_refused_with_what_to_do(folder, method, how):
    edit_config(folder, quantization_config={"quant_method": method})
    assert how in refusal(folder)
