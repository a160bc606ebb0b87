"""Gradients of the weights that units own, summed over all windows and ranks as they appear in backward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor

from hfprune_dist.core.exact_sums import TensorScale
from hfprune_dist.core.linear_observer import SeeLinear
from hfprune_dist.core.wide import widened
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.layer_sums import LayerSums, MatrixSums, Size


class WeightGradients(LayerSums):
    """The sum over windows of dL/dW, for some weights of every layer.

    Args:
        sizes: name of a weight within its layer -> its size [out, in] in each layer.
        micro_batches: number of micro-batches in the whole pass.
        folder: parent folder of the saved states.
    """

    def __init__(self, sizes: Mapping[str, Sequence[Size]], micro_batches: int, folder: Path, world: World) -> None:
        sums = {name: MatrixSums(of_layers, TensorScale, micro_batches, world) for name, of_layers in sizes.items()}
        super().__init__(sums, folder)
        self._num_layers = {name: len(of_layers) for name, of_layers in sizes.items()}

    def seeing(self, *, counts: bool) -> Mapping[str, Sequence[SeeLinear]]:
        """Return callbacks that add up gradients, per weight and layer; this rank's are added only if ``counts``."""
        return {
            name: [partial(_see, sums, counts, layer) for layer in range(self._num_layers[name])]
            for name, sums in self._sums.items()
        }


def _see(sums: MatrixSums, counts: bool, layer: int, inputs_BTI: Tensor, gradients_BTO: Tensor) -> None:
    inputs_NI, gradients_NO = inputs_BTI.flatten(0, -2), gradients_BTO.flatten(0, -2)
    sums.add(layer, widened(gradients_NO).T @ widened(inputs_NI) if counts else None)
