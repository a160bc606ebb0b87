"""What an architecture does to its head's logits."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.head import AfterHead

# Keys by which some architectures change their head's logits -> the neutral value.
_NEUTRAL = {"logits_scaling": 1.0, "logit_scale": 1.0, "lm_head_multiplier": 1.0, "final_logit_softcapping": None}
# Architectures that multiply by ``logits_scaling``; others divide by it.
_MULTIPLYING = ("hyperclovax",)


def after_head(checkpoint: Checkpoint) -> AfterHead:
    """What a checkpoint's architecture does to its logits, as far as its config.json tells."""
    config: Any = AutoConfig.from_pretrained(checkpoint.path).get_text_config()
    stated: dict[str, Any] = {key: getattr(config, key, None) or neutral for key, neutral in _NEUTRAL.items()}
    scaling = stated["logits_scaling"]
    scale = stated["logit_scale"] * stated["lm_head_multiplier"]
    scale *= scaling if checkpoint.family.model_type in _MULTIPLYING else 1 / scaling
    return AfterHead(scale, stated["final_logit_softcapping"])
