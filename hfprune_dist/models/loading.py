"""Loading checkpoints, those with layers of different widths included, without code from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from hfprune_dist.models import modeling_pruned
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint


def load_causal_lm(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint folder; sharded while an ``HfDeepSpeedConfig`` lives."""
    checkpoint = open_checkpoint(folder)
    # Left to itself, transformers compares the head with the embedding, which it can't where both are sharded.
    changes = {"tie_word_embeddings": False} if checkpoint.has_untied_head else {}
    model: PreTrainedModel = model_class(checkpoint).from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", **changes
    )
    return model


def model_class(checkpoint: Checkpoint) -> Any:
    """The class that can hold a checkpoint's weights."""
    return AutoModelForCausalLM if checkpoint.is_uniform else getattr(modeling_pruned, checkpoint.family.pruned_class)
