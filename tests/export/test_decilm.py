"""DeciLM folders as vLLM reads them: sizes of layers as attributes of the configuration, and Llama's tensors."""

import copy
import json
import re

import pytest
import torch
from hfprune_launch.export import main
from masking import FEWER, WIDTHS, write
from safetensors.torch import load_file
from sweeps import in_process
from tiny import save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.structures.kept import Kept

IDS = torch.randint(3, 260, (2, 12), generator=torch.Generator().manual_seed(0))


def exported(folder, variant, units, **options):
    """Export a pruned tiny model; return the checkpoint's folder, the exit code, and what was said."""
    dense = save_tiny(folder / "dense", variant, **options)
    (dense / "LICENSE").write_text("free")
    write(open_checkpoint(dense), Kept.of_all_layers(units), folder / "pruned")
    return folder / "pruned", *in_process(main, str(folder / "pruned"), str(folder / "decilm"), "--to", "decilm")


def as_vllm_does(folder):
    """Build the model from a DeciLM folder by what vLLM's class reads of its configuration."""
    config = copy.deepcopy(AutoConfig.from_pretrained(folder, trust_remote_code=True))
    assert config.architectures == ["DeciLMForCausalLM"] and config.model_type == "nemotron-nas"
    model = LlamaForCausalLM(config)
    for layer, block in zip(model.model.layers, config.block_configs, strict=True):
        assert not (block.attention.no_op or block.ffn.no_op)
        groups = config.num_attention_heads // block.attention.n_heads_in_group
        assert layer.self_attn.k_proj.out_features == groups * config.head_dim
        own = copy.copy(config)
        if hasattr(block.ffn, "ffn_mult"):
            own.intermediate_size = -(-int(2 * block.ffn.ffn_mult * config.hidden_size / 3) // 256) * 256
        else:
            own.intermediate_size = block.ffn.intermediate_size
        layer.mlp = LlamaMLP(own)
        if config.qkv_bias:
            for name in ("q_proj", "k_proj", "v_proj"):
                rows = getattr(layer.self_attn, name).out_features
                setattr(layer.self_attn, name, torch.nn.Linear(config.hidden_size, rows))
    found = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    assert not found.unexpected_keys and {*found.missing_keys} <= {"lm_head.weight"}
    return model.eval()


@pytest.mark.parametrize(
    ("variant", "units", "options"),
    [
        ("llama", WIDTHS | FEWER, {}),
        ("mistral", {"neurons": [torch.arange(256), torch.arange(512)]}, {"intermediate_size": 600}),
        ("qwen2", WIDTHS, {}),
        ("llama-tied-biases", WIDTHS, {}),
    ],
)
def test_a_decilm_computes_what_the_checkpoint_does(tmp_path, variant, units, options):
    pruned, code, shown, _ = exported(tmp_path, variant, units, **options)
    multiples = variant == "mistral"
    assert code == 0 and ("mlx-lm needs multiples of 256" in shown) != multiples
    told = json.loads((tmp_path / "decilm" / "config.json").read_text())
    assert all(("ffn_mult" in block["ffn"]) == multiples for block in told["block_configs"])
    assert told["rope_theta"] == 1e4 and (tmp_path / "decilm" / "LICENSE").is_file()
    ours, theirs = (
        AutoModelForCausalLM.from_pretrained(pruned, trust_remote_code=True),
        as_vllm_does(tmp_path / "decilm"),
    )
    with torch.no_grad():
        torch.testing.assert_close(theirs(input_ids=IDS).logits, ours(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("variant", "units", "options", "why"),
    [
        (
            "llama",
            {"kv_groups": [torch.tensor([1]), torch.tensor([0, 1])]},
            {},
            "layers that differ in heads need --to gguf",
        ),
        ("qwen3", WIDTHS, {}, "written for llama, mistral, qwen2, not for a qwen3"),
        ("mistral", WIDTHS, {"sliding_window": 64}, "no sliding_window, here 64"),
        (
            "llama",
            {"kv_groups": [torch.arange(3)] * 2},
            {"num_attention_heads": 8, "num_key_value_heads": 4},
            "heads must divide its hidden_size",
        ),
    ],
)
def test_what_a_decilm_can_not_hold_is_refused(tmp_path, variant, units, options, why):
    _, code, _, said = exported(tmp_path, variant, units, **options)
    assert code == 2 and not (tmp_path / "decilm").exists() and not list(tmp_path.glob(".*"))
    assert re.search(why, said)
