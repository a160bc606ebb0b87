"""The adapter on disk is peft's, and the merged checkpoint computes what model and adapter compute together."""

from __future__ import annotations

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import FAMILY, save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.lora_adapter import (
    lora_targets,
    merge_weight_file,
    read_adapter,
    write_adapter,
)
from hfprune_dist.checkpoints.write_pruned import write_companions
from hfprune_dist.models.loading import load_causal_lm

RANK, ALPHA = 4, 6
INPUT_IDS = torch.arange(3, 43).view(2, 20)


def adapted_model(folder):
    """Return a peft model whose adapter has an effect."""
    checkpoint = open_checkpoint(folder)
    targets = lora_targets(checkpoint.family, checkpoint.ranks)
    config = LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=targets)
    model = get_peft_model(load_causal_lm(folder, torch.float32), config).eval()
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def lora_parameters(model):
    return {name: tensor.detach() for name, tensor in model.named_parameters() if "lora_" in name}


def logits_of(model):
    with torch.no_grad():
        return model(input_ids=INPUT_IDS).logits


def merge(source, adapter_folder, target):
    checkpoint = open_checkpoint(source)
    target.mkdir()
    for file in checkpoint.weight_files:
        merge_weight_file(checkpoint, file, read_adapter(adapter_folder), target)
    write_companions(checkpoint, target, checkpoint.config)


def test_peft_loads_our_adapter_and_we_load_pefts(tmp_path):
    source = save_tiny(tmp_path / "source")
    model = adapted_model(source)
    write_adapter(tmp_path / "ours", lora_parameters(model), lora_targets(FAMILY), RANK, ALPHA)
    loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(source), tmp_path / "ours").eval()
    torch.testing.assert_close(logits_of(loaded), logits_of(model), rtol=0, atol=0)
    model.save_pretrained(tmp_path / "pefts")
    ours, pefts = read_adapter(tmp_path / "ours"), read_adapter(tmp_path / "pefts")
    assert ours.scale == pefts.scale == ALPHA / RANK
    assert ours.factors.keys() == pefts.factors.keys()
    for name, factors in ours.factors.items():
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(factors, pefts.factors[name], strict=True))


def test_bfloat16_is_rounded_once(tmp_path):
    source = save_tiny(tmp_path / "source", dtype=torch.bfloat16)
    model = adapted_model(source)
    write_adapter(tmp_path / "adapter", lora_parameters(model), lora_targets(FAMILY), RANK, ALPHA)
    merge(source, tmp_path / "adapter", tmp_path / "merged")
    name = "model.layers.1.mlp.up_proj.weight"
    factor_a, factor_b = (factor.double() for factor in read_adapter(tmp_path / "adapter").factors[name])
    original = AutoModelForCausalLM.from_pretrained(source, dtype="auto").state_dict()[name]
    result = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype="auto").state_dict()[name]
    exact = original.double() + ALPHA / RANK * factor_b @ factor_a
    assert result.dtype == torch.bfloat16
    assert (result == exact.to(torch.bfloat16)).float().mean() > 0.99
