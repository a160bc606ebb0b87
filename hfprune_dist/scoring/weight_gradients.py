"""Gradients of the weights that units own, summed over all windows and ranks as they appear in backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from torch import Tensor

from hfprune_dist.core.linear_observer import SeeLinear
from hfprune_dist.core.wide import wide_product
from hfprune_dist.scoring.layer_sums import LayerSums


class WeightGradients(LayerSums):
    """The sum over windows of dL/dW, for some weights of every layer; ``sizes`` are theirs [out, in], by name."""

    def seeing(self, *, counts: bool) -> Mapping[str, Sequence[SeeLinear]]:
        """Return callbacks that add up gradients, per weight and layer; this rank's are added only if ``counts``."""
        return {
            name: [partial(self._see, name, counts, layer) for layer in range(len(of_layers))]
            for name, of_layers in self.sizes.items()
        }

    def _see(self, name: str, counts: bool, layer: int, inputs_BTI: Tensor, gradients_BTO: Tensor) -> None:
        inputs_NI, gradients_NO = inputs_BTI.flatten(0, -2), gradients_BTO.flatten(0, -2)
        self.add(name, layer, wide_product(gradients_NO, inputs_NI) if counts else None)
