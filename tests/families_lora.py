"""LoRA on checkpoints of ``families``: trained by peft, written and merged by our code."""

from __future__ import annotations

import torch
from families_masked import dense_of
from peft import LoraConfig, get_peft_model

from hfprune_dist.checkpoints.lora_adapter import lora_targets, merge_weight_file, read_adapter, write_adapter
from hfprune_dist.checkpoints.write_pruned import write_companions


def trained_and_merged(checkpoint, folder, windows):
    """Train for some steps until the loss has fallen; write ``folder/adapter`` and ``folder/merged``.

    Returns:
        The model with its adapter.
    """
    torch.manual_seed(0)
    targets = lora_targets(checkpoint.family, checkpoint.ranks)
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=6, target_modules=targets)
    model = get_peft_model(dense_of(checkpoint), adapter)
    optimizer = torch.optim.AdamW([it for it in model.parameters() if it.requires_grad], lr=1e-2)
    losses = []
    for _ in range(6):
        losses.append(model(input_ids=windows, labels=windows).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    weights = {name: tensor.detach() for name, tensor in model.named_parameters() if "lora_" in name}
    write_adapter(folder / "adapter", weights, targets, 4, 6)
    (folder / "merged").mkdir()
    for file in checkpoint.weight_files:
        merge_weight_file(checkpoint, file, read_adapter(folder / "adapter"), folder / "merged")
    write_companions(checkpoint, folder / "merged", checkpoint.config)
    return model.eval()
