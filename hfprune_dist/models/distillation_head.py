"""A model whose output is its divergence from the dense model, in place of logits."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hfprune_dist.checkpoints.families import Family
from hfprune_dist.core.distillation import summed_divergence
from hfprune_dist.core.head import NOTHING, AfterHead
from hfprune_dist.models.after_head import leave_logits


class DistillingHead:
    """Takes the place of a model's head: ``model(...).logits`` is then the divergence that training takes down.

    The head's module stays, so that a sharded one is gathered and released as ever.

    Args:
        model: a causal language model, whose head is frozen and the dense model's too.
        after: what becomes of its logits.
    """

    def __init__(self, model: nn.Module, family: Family, after: AfterHead = NOTHING) -> None:
        leave_logits(model)
        head: Any = family.head_of(model)
        self._after = after
        head.forward = self._diverge
        self._head = head
        self._dense_BTC = self._counts_B = head.weight.new_empty(0)

    def expect(self, dense_BTC: Tensor, counts_B: Tensor) -> None:
        """Before each forward: what the dense model makes of the same tokens.

        Args:
            dense_BTC: its final hidden states [rows, tokens, hidden_size], in the model's dtype.
            counts_B: which rows count, bool [rows]; the others are there for the ranks to stay in step.
        """
        self._dense_BTC, self._counts_B = dense_BTC, counts_B

    def _diverge(self, hidden_BTC: Tensor) -> Tensor:
        """Sum over the tokens of the rows that count of KL(dense || model), nats."""
        hidden_NC, dense_NC = (it[self._counts_B].flatten(0, 1) for it in (hidden_BTC, self._dense_BTC))
        return summed_divergence(hidden_NC, dense_NC, self._head.weight, self._head.bias, self._after)
