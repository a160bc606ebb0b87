"""The published formulation, as a reference to measure against (HFPrune, arXiv 2603.08083, and its public code).

It takes the entropy of all tokens' float32 logits at once, lets autograd compute every gradient, including those of the
weights, keeps the activations of all layers and their gradients until the backward pass is over, and accumulates in the
model's dtype. This code is written from that description, to measure what it costs to do it this way.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class PublishedScores:
    """Accumulates sum |h * dH/dh| over windows.

    Args:
        model: a Hugging Face model whose parameters need gradients.
        down_projections: one module per layer, in order.
    """

    def __init__(self, model: nn.Module, down_projections: Sequence[nn.Module]) -> None:
        self._model = model
        self._modules = down_projections
        self.scores: list[Tensor] = []

    def add(self, input_ids_BT: Tensor) -> None:
        """Run forward and backward on some windows."""
        hidden: list[Tensor] = []

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            inputs[0].retain_grad()
            hidden.append(inputs[0])

        handles = [module.register_forward_pre_hook(keep) for module in self._modules]
        logits_BTV = self._model(input_ids=input_ids_BT, use_cache=False).logits.float()
        p_BTV = logits_BTV.softmax(dim=-1)
        log_p_BTV = logits_BTV.log_softmax(dim=-1)
        entropy: Any = -(p_BTV * log_p_BTV).sum(dim=-1).mean()
        entropy.backward()
        for handle in handles:
            handle.remove()
        self._accumulate(hidden)
        self._model.zero_grad()

    @torch.no_grad()
    def _accumulate(self, hidden: list[Tensor]) -> None:
        gradients = [h_BTD.grad for h_BTD in hidden if h_BTD.grad is not None]
        terms = [(h_BTD * gradient).abs().sum(dim=(0, 1)) for h_BTD, gradient in zip(hidden, gradients, strict=True)]
        self.scores = [a + b for a, b in zip(self.scores, terms, strict=True)] if self.scores else terms
