"""Loading checkpoints, those with layers of different widths included, without code from the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from hfprune_dist.errors import UserError
from hfprune_dist.models import modeling_pruned
from hfprune_dist.models.checkpoint import Checkpoint, open_checkpoint


def load_causal_lm(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a checkpoint folder; sharded while an ``HfDeepSpeedConfig`` lives.

    Raises:
        UserError: as ``require_exact_rotary`` does.
    """
    checkpoint = open_checkpoint(folder)
    # Left to itself, transformers compares the head with the embedding, which it can't where both are sharded.
    changes = {"tie_word_embeddings": False} if checkpoint.has_untied_head else {}
    model: PreTrainedModel = model_class(checkpoint).from_pretrained(
        folder, dtype=dtype, attn_implementation="sdpa", **changes
    )
    require_exact_rotary(model, folder)
    return model


def require_exact_rotary(model: nn.Module, folder: Path) -> None:
    """Check that the frequencies of rotary embeddings are float32, whatever the weights' dtype.

    DeepSpeed 0.17 to 0.19.3 round them to bfloat16, which moves every position of a long window.

    Raises:
        UserError: naming the buffer and the remedy.
    """
    for name, buffer in model.named_buffers():
        if name.endswith("inv_freq") and buffer.dtype != torch.float32:
            raise UserError(
                f"{folder}: {name} is {buffer.dtype} once the model is loaded, not float32; "
                "install deepspeed 0.19.4 or newer (pip install -U 'deepspeed>=0.19.4')"
            )


def model_class(checkpoint: Checkpoint) -> Any:
    """The class that can hold a checkpoint's weights."""
    return AutoModelForCausalLM if checkpoint.is_uniform else getattr(modeling_pruned, checkpoint.family.pruned_class)
