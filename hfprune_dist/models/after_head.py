"""What an architecture does to its head's logits, and a head that makes a model output its divergence from the dense
model in their place.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.families import Family
from hfprune_dist.core.head import NOTHING, AfterHead
from hfprune_dist.core.losses import summed_divergence

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


def leave_logits(model: Any) -> None:
    """Make a model output exactly what its head computes."""
    for key, neutral in _NEUTRAL.items():
        for owner in (model, model.config, model.config.get_text_config()):
            if getattr(owner, key, None) is not None:
                setattr(owner, key, neutral)


class DistillingHead:
    """Replacement for a model's head: ``model(...).logits`` is then the divergence that training minimizes.

    The head's module stays, so that a sharded head is gathered and released as usual.

    Args:
        model: a causal language model whose head is frozen and is also the dense model's.
        after: what the model does to its logits.
    """

    def __init__(self, model: nn.Module, family: Family, after: AfterHead = NOTHING) -> None:
        leave_logits(model)
        head: Any = family.head_of(model)
        self._after = after
        head.forward = self._diverge
        self._head = head
        self._dense_BTC, self._rows = head.weight.new_empty(0), 0

    def expect(self, dense_BTC: Tensor, rows: int) -> None:
        """Set, before each forward, what the dense model computes for the same tokens.

        Args:
            dense_BTC: the dense model's final hidden states [rows, tokens, hidden_size], in this model's dtype.
            rows: how many rows count, the first ones; the others are there only to keep the ranks in step. A number on
                the host, since a mask on a GPU would make the host wait for it.
        """
        self._dense_BTC, self._rows = dense_BTC, rows

    def _diverge(self, hidden_BTC: Tensor) -> Tensor:
        """Sum of KL(dense || model), in nats, over the tokens of the rows that count."""
        hidden_NC, dense_NC = (states_BTC[: self._rows].flatten(0, 1) for states_BTC in (hidden_BTC, self._dense_BTC))
        return summed_divergence(hidden_NC, dense_NC, self._head.weight, self._head.bias, self._after)
