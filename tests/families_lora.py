"""LoRA on checkpoints of ``families``: trained by peft, written and merged by our code."""

from __future__ import annotations

import torch
from families_masked import dense_of
from peft import LoraConfig, get_peft_model
from torch import nn

from hfprune_dist.checkpoints.lora_adapter import lora_targets, merged, read_adapter, write_adapter
from hfprune_dist.checkpoints.write_pruned import write_companions, write_weight_file
from hfprune_dist.structures.kept import Kept

# Blocks of a layer that attend to other tokens; convolutions and state-space blocks don't.
ATTENTION = {"self_attn", "attention", "linear_attn"}
# Linear layers of attention without an adapter: what chooses keys has no gradient, and peft would take this gate of a
# mixture of experts for the experts'.
CHOOSING = frozenset({"indexer.wq_b", "indexer.wk", "indexer.weights_proj"})
WITHOUT = {"deepseek_v32": CHOOSING, "glm_moe_dsa": CHOOSING, "afmoe": frozenset({"gate_proj"})}


def linears_to_train(model, family):
    """Return the names of all linear layers in the decoder's attention and, without experts, in its MLPs."""
    rows, down, _ = family.projections
    mlp = {".".join(filter(None, (family.mlp, name))) for name in (*rows, down)}
    found = set()
    for number, layer in enumerate(family.layers_of(model)):
        for name, module in layer.named_modules():
            block, _, inside = name.partition(".")
            attends = block in ATTENTION and inside not in WITHOUT.get(family.model_type, ())
            if isinstance(module, nn.Linear) and (attends or (name in mlp and not family.experts)):
                found.add(f"{family.layers}.{number}.{name}")
    return found


def trained_and_merged(checkpoint, folder, windows):
    """Train for some steps until the loss has fallen; write ``folder/adapter`` and ``folder/merged``. All linear layers
    that are to be trained are, and no others.

    Returns:
        The model with its adapter.
    """
    torch.manual_seed(0)
    targets = lora_targets(checkpoint.family, checkpoint.ranks)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets)
    dense = dense_of(checkpoint)
    expected = linears_to_train(dense, checkpoint.family)
    model = get_peft_model(dense, adapter)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=windows, labels=windows).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    weights = {name: tensor.detach() for name, tensor in model.named_parameters() if "lora_" in name}
    factor = ".lora_B.default.weight"
    trained = {name.removesuffix(factor) for name, weight in weights.items() if name.endswith(factor) and weight.any()}
    assert trained == {f"base_model.model.{name}" for name in expected}
    assert len(weights) == 2 * len(expected)
    write_adapter(folder / "adapter", weights, targets, 4, 6)
    (folder / "merged").mkdir()
    stays = Kept(tuple(range(checkpoint.num_layers)))
    learnt = merged(checkpoint, read_adapter(folder / "adapter"), stays)
    for file in checkpoint.weight_files:
        write_weight_file(checkpoint, file, stays, folder / "merged", learnt)
    write_companions(checkpoint, folder / "merged", checkpoint.config)
    return model.eval()
