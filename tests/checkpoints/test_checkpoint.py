import pytest
from safetensors.torch import load_file, save_file
from tiny import edit_json, save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.errors import UserError


@pytest.fixture
def folder(tmp_path):
    return save_tiny(tmp_path / "model")


def refusal(folder):
    with pytest.raises(UserError) as caught:
        open_checkpoint(folder)
    return str(caught.value)


def test_a_missing_shard_is_named(tmp_path):
    folder = save_tiny(tmp_path / "m", shard_size="20KB")
    victim = sorted(folder.glob("model-*.safetensors"))[1]
    victim.unlink()
    assert victim.name in refusal(folder) and "missing" in refusal(folder)


@pytest.mark.parametrize("keep", [0, 20_000])
def test_truncated_weights(folder, keep):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    assert "model.safetensors" in refusal(folder)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("model.layers.0.self_attn.q_proj.weight", "tensor self_attn.q_proj.weight of layer 0"),
        ("model.embed_tokens.weight", "exactly one table of embeddings"),
        ("model.norm.weight", "exactly one norm"),
        ("lm_head.weight", "tensor lm_head.weight is missing"),
    ],
)
def test_a_tensor_that_transformers_would_make_up_is_named(folder, name, told):
    file = folder / "model.safetensors"
    weights = load_file(file)
    del weights[name]
    save_file(weights, file)
    assert told in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"vocab_size": 7}, "vocab_size and hidden_size [7, 32]"),
        ({"num_hidden_layers": True}, "num_hidden_layers must be a positive integer, not True"),
        ({"layer_sizes": {"intermediate_size": [48, 47]}}, "intermediate_size 47 for this layer"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, "Mxfp4Config(dequantize=True)"),
        ({"num_key_value_heads": 1}, "num_attention_heads 4 and num_key_value_heads 1 for this layer"),
    ],
)
def test_a_config_that_is_not_the_weights_own(folder, changes, expected):
    edit_json(folder / "config.json", **changes)
    assert expected in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "positions"),
    [
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}}, 512),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}}, 1024),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 4}}, 2048),
    ],
)
def test_positions_as_a_rope_scaling_stretches_them(folder, changes, positions):
    edit_json(folder / "config.json", **changes)
    assert open_checkpoint(folder).max_positions == positions
