"""Weights times their gradients, of all that a neuron owns at a hidden channel together, window by window.

Neuron n of a gated MLP has three weights at hidden channel j: gate_nj, up_nj and down_jn. To first order, the sum of
the three products W * dL/dW is what the loss loses where all of them go at once; products of opposite sign cancel
(SDMPrune: arXiv 2506.11120). A window's gradients are made where a backward shows what they are made of, a few neurons
at a time, so that no weight's whole gradient ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.core.blocks import row_blocks
from hfprune_dist.core.linear_observer import SeenLinear

# In float32, of each number of a block of weights: the sum of products, and one that is added to it.
BLOCK_BYTES = 2 * 4


@dataclass(frozen=True)
class _Shown:
    """Of one linear layer: inputs [windows, tokens, in] and gradients at outputs [windows, tokens, out]."""

    inputs: Tensor
    gradients: Tensor


class CoupledProducts:
    """One layer's scores by its neurons' coupled weights, once a backward has shown all of its linear layers.

    Args:
        rows: linear layers that make the channels, whose rows the neurons own.
        columns: the projection that reads them, whose columns they own.
        add: called with the scores of a micro-batch, added up over its windows: float32 or wider [neurons].
    """

    def __init__(self, rows: Sequence[nn.Module], columns: nn.Module, add: Callable[[Tensor], None]) -> None:
        self._linears = [*rows, columns]
        self._add = add
        self._shown: dict[int, _Shown] = {}
        self._weights: dict[int, Tensor] = {}

    def seen_linears(self) -> list[SeenLinear]:
        """The linear layers, and what is to be shown of them."""
        return [
            SeenLinear(module, partial(self._see, number), partial(self._see_weight, number))
            for number, module in enumerate(self._linears)
        ]

    def _see(self, number: int, inputs_BTI: Tensor, gradients_BTO: Tensor) -> None:
        self._shown[number] = _Shown(inputs_BTI, gradients_BTO)

    def _see_weight(self, number: int, weight_OI: Tensor) -> None:
        self._weights[number] = weight_OI
        if len(self._weights) < len(self._linears):
            return
        *rows, columns = ((self._weights[it], self._shown[it]) for it in range(len(self._linears)))
        # A projection that reads the channels is one that makes them, seen backwards.
        weight_CD, shown = columns
        alike = [*rows, (weight_CD.T, _Shown(shown.gradients, shown.inputs))]
        self._shown, self._weights = {}, {}
        self._add(_scores(alike))


def _scores(coupled: Sequence[tuple[Tensor, _Shown]]) -> Tensor:
    """Sum over windows of the mean over hidden channels of |sum over weights of W * dL/dW| [neurons].

    Args:
        coupled: weights [neurons, hidden_size], and for the product g^T x that is the weight's gradient, in place of
            inputs x [windows, tokens, hidden_size], in place of gradients g [windows, tokens, neurons].
    """
    first = coupled[0][0]
    wide = torch.promote_types(first.dtype, torch.float32)
    scores_D = torch.zeros(len(first), dtype=wide, device=first.device)
    for window in range(len(coupled[0][1].inputs)):
        seen = [(weight_DC, it.gradients[window], it.inputs[window].to(wide)) for weight_DC, it in coupled]
        for block in row_blocks(first, BLOCK_BYTES):
            products_DC = first.new_zeros((), dtype=wide)
            for weight_DC, gradients_TD, inputs_TC in seen:
                gradient_DC = gradients_TD[:, block].to(wide).T @ inputs_TC
                products_DC = gradient_DC.mul_(weight_DC[block]).add_(products_DC)
            scores_D[block] += products_DC.abs_().mean(dim=1)
    return scores_D
