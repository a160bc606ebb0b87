"""Costs of a token, compared with torch's own counter and with the tensors of a real cache."""

import pytest
import torch
from families import MIXTURES, save_model
from masking import write
from peft import LoraConfig, get_peft_model
from tiny import save_tiny
from torch.utils.flop_counter import FlopCounterMode

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.lora_adapter import lora_targets
from hfprune_dist.checkpoints.token_costs import token_costs, training_flops
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.structures.kept import Kept

LAYERS, GROUPS = 3, 3
SHAPE = {"num_hidden_layers": LAYERS, "num_key_value_heads": GROUPS, "num_attention_heads": 2 * GROUPS}


def counted_flops(model, input_ids_BT, cache=None):
    """Return torch's count for one forward pass, and the cache after it; the counter ignores fused attention."""
    model.set_attn_implementation("eager")
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        outputs = model(input_ids=input_ids_BT, cache=cache, use_cache=True)
    return counter.get_total_flops(), outputs.cache


def check(checkpoint, batch_size, tokens):
    costs, model = token_costs(checkpoint), load_causal_lm(checkpoint.path, torch.float32)
    vocabulary = checkpoint.config["vocab_size"]
    of_prompt, cache = counted_flops(model, torch.randint(vocabulary, (batch_size, tokens)))
    assert of_prompt == pytest.approx(batch_size * tokens * costs.flops(tokens), rel=0.03)  # norms and biases
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert held == batch_size * tokens * costs.cached_channels * torch.float32.itemsize
    return costs, model


def test_a_step_of_lora_training_costs_twice_a_forward_for_every_token(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "dense", "llama", hidden_size=96, num_hidden_layers=6))
    lora = LoraConfig(task_type="CAUSAL_LM", r=1, target_modules=lora_targets(checkpoint.family))
    model = get_peft_model(load_causal_lm(checkpoint.path, torch.float32).requires_grad_(False), lora)
    input_ids_BT = torch.randint(64, (3, 8))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=input_ids_BT, labels=input_ids_BT).loss.backward()
    assert counter.get_total_flops() == pytest.approx(3 * 8 * training_flops(checkpoint, 8), rel=0.1)


@pytest.mark.parametrize(("widths", "groups"), [((20, 20), (2, 2)), ((9, 30), (1, 3))])
def test_pruned_shapes_plain_and_layer_by_layer(tmp_path, widths, groups):
    dense = open_checkpoint(save_tiny(tmp_path / "dense", "llama", hidden_size=36, **SHAPE))
    units = {
        "neurons": [torch.arange(count) for count in widths],
        "kv_groups": [torch.arange(count) for count in groups],
    }
    check(dense, 1, 5)
    write(dense, Kept((0, 2), units), tmp_path / "pruned")
    costs, model = check(open_checkpoint(tmp_path / "pruned"), 2, 7)
    assert costs.parameters == costs.active_parameters == sum(parameter.numel() for parameter in model.parameters())


def test_latent_attention_has_queries_and_values_of_sizes_of_their_own(tmp_path):
    checkpoint = open_checkpoint(save_model(tmp_path, "youtu"))
    costs = token_costs(checkpoint)
    assert (costs.query_channels, costs.value_channels) == (3 * 4 * (8 + 8), 3 * 4 * 8)
    check(checkpoint, batch_size=2, tokens=7)


def test_keys_are_values_too_in_layers_without_a_projection_of_values(tmp_path):
    checkpoint = open_checkpoint(save_model(tmp_path, "gemma4_text", attention_k_eq_v=True))
    assert sum(name.endswith("v_proj.weight") for name in checkpoint.tensors) == 1 < checkpoint.num_layers
    check(checkpoint, batch_size=2, tokens=3)


@pytest.mark.parametrize(
    ("model_type", "queries", "values", "cached"),
    [
        ("qwen3_next", 4 * 8, 4 * 8, 2 * 2 * 8),  # a gate comes with the queries
        ("kimi_linear", 4 * (8 + 8), 4 * 8, 16 + 8),  # linear attention has queries, keys and values as well
    ],
)
def test_only_layers_that_attend_to_earlier_tokens_cache_them(tmp_path, model_type, queries, values, cached):
    costs = token_costs(open_checkpoint(save_model(tmp_path, model_type, **MIXTURES[model_type])))
    assert (costs.query_channels, costs.value_channels, costs.cached_channels) == (queries, values, cached)
