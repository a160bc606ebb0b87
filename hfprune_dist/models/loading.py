"""Loading checkpoints, those with layers of different widths included, without code from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hfprune_dist.models import modeling_pruned
from hfprune_dist.models.checkpoint import open_checkpoint


def load_causal_lm(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint folder; sharded while an ``HfDeepSpeedConfig`` lives."""
    model: PreTrainedModel = model_class(folder).from_pretrained(folder, dtype=dtype, attn_implementation="sdpa")
    return model


def model_class(folder: Path) -> Any:
    """The class that can hold the checkpoint's weights."""
    checkpoint = open_checkpoint(folder)
    return AutoModelForCausalLM if checkpoint.is_uniform else getattr(modeling_pruned, checkpoint.family.pruned_class)
