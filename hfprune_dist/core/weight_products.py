"""Products of all the weights that a neuron owns with their gradients, window by window.

Neuron n of a gated MLP has three weights at hidden channel j, gate_nj, up_nj and down_jn. To first order, removing all
three at once lowers the loss by the sum of their products W * dL/dW, in which products of opposite sign cancel
(SDMPrune: arXiv 2506.11120).

A window's gradients are computed a few rows at a time, when a backward shows the inputs and output gradients that they
are made of, so no weight's whole gradient ever exists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.core.blocks import row_blocks
from hfprune_dist.core.linear_observer import SeenLinear
from hfprune_dist.core.unit_outputs import InputProjection
from hfprune_dist.core.wide import wide_dtype

# Bytes per element of a block of weights, in float32: the products, and what is added to or multiplied with them.
BLOCK_BYTES = 2 * 4


@dataclass(frozen=True)
class OwnedRows:
    """A weight whose rows the units own, and the two factors of its gradient g^T x.

    A projection that reads the units' channels is treated as one that makes them, by transposing its weight and
    swapping x and g.

    Attributes:
        weight: [rows, hidden_size].
        inputs: x [windows, tokens, hidden_size].
        gradients: g [windows, tokens, rows].
    """

    weight: Tensor
    inputs: Tensor
    gradients: Tensor

    @property
    def nothing(self) -> Tensor:
        """Zeros as the start of sums over windows, float32 or wider [rows]."""
        return torch.zeros(len(self.weight), dtype=wide_dtype(self.weight.dtype), device=self.weight.device)

    def of_window(self, window: int) -> Callable[[slice], Tensor]:
        """Return a function: slice of rows -> their products with the window's gradients, float32 or wider."""
        wide = wide_dtype(self.weight.dtype)
        gradients_TD, inputs_TC = self.gradients[window], self.inputs[window].to(wide)

        def products(rows: slice) -> Tensor:
            gradient_DC = gradients_TD[:, rows].to(wide).T @ inputs_TC
            return gradient_DC.mul_(self.weight[rows])

        return products


class CoupledProducts:
    """Scores of one layer's units from their weights, made once a backward has shown all of its linear layers: the sum
    over windows of the mean over hidden channels of |W * dL/dW, summed over one row of each weight|. Units own the same
    number of rows of every weight.

    Args:
        rows: linear layers that the channels are made of, whose rows the units own.
        columns: the projection that reads the channels, whose columns the units own.
        units: number of units.
        add: called with the scores of a micro-batch, summed over its windows: float32 or wider [units].
    """

    def __init__(
        self, rows: Sequence[InputProjection], columns: nn.Module, units: int, add: Callable[[Tensor], None]
    ) -> None:
        self._linears = [*(it.module for it in rows), columns]
        self._row_parts = [it.parts for it in rows]
        self._units = units
        self._add = add
        self._shown: dict[int, tuple[Tensor, Tensor]] = {}
        self._owned: dict[int, list[OwnedRows]] = {}

    def seen_linears(self) -> list[SeenLinear]:
        """Return the linear layers with the callbacks that must see them."""
        return [
            SeenLinear(linear, partial(self._see, number), partial(self._see_weight, number))
            for number, linear in enumerate(self._linears)
        ]

    def _see(self, number: int, inputs_BTI: Tensor, gradients_BTO: Tensor) -> None:
        self._shown[number] = inputs_BTI, gradients_BTO

    def _see_weight(self, number: int, weight_OI: Tensor) -> None:
        inputs_BTI, gradients_BTO = self._shown.pop(number)
        if number == len(self._row_parts):  # whose columns the units own
            owned = [OwnedRows(weight_OI.T, gradients_BTO, inputs_BTI)]
        else:
            parts = self._row_parts[number]
            pairs = zip(weight_OI.chunk(parts), gradients_BTO.chunk(parts, dim=-1), strict=True)
            owned = [OwnedRows(weight, inputs_BTI, gradients) for weight, gradients in pairs]
        self._owned[number] = owned
        if len(self._owned) == len(self._linears):
            self._add(self._scores([it for place in range(len(self._linears)) for it in self._owned.pop(place)]))

    def _scores(self, parts: Sequence[OwnedRows]) -> Tensor:
        """Return scores [units] from all linear layers, those of ``rows`` first."""
        first, scores_D = parts[0], parts[0].nothing
        for window in range(len(first.inputs)):
            products = [owned.of_window(window) for owned in parts]
            for rows in row_blocks(first.weight, BLOCK_BYTES):
                sum_DC = scores_D.new_zeros(())
                for of_rows in products:
                    sum_DC = of_rows(rows).add_(sum_DC)
                scores_D[rows] += sum_DC.abs_().mean(dim=1)
        sums_U: Tensor = scores_D.unflatten(0, (self._units, -1)).sum(dim=1)
        return sums_U
