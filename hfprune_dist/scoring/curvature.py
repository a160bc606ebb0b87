"""Second moments of the gradients at output projections' outputs, summed over all ranks as they appear in backward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from hfprune_dist.core.exact_sums import GramScale
from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.core.unit_sums import SeeOutputGradients
from hfprune_dist.core.wide import widened
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.layer_sums import LayerSums, MatrixSums


class Curvature(LayerSums):
    """The sum of g g^T over tokens, for every layer and kind, with g the gradient at the output projection's output.

    Args:
        shapes: kind -> (num_layers, hidden_size).
        micro_batches: number of micro-batches in the whole pass.
        folder: parent folder of the saved states.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], micro_batches: int, folder: Path, world: World) -> None:
        sums = {
            kind: MatrixSums([(hidden_size, hidden_size)] * num_layers, GramScale, micro_batches, world)
            for kind, (num_layers, hidden_size) in shapes.items()
        }
        super().__init__(sums, folder)

    def seeing(self, *, counts: bool) -> Mapping[str, SeeOutputGradients]:
        """Return callbacks that add up gradients, for each kind; those of this rank are added only if ``counts``."""
        return {kind: partial(_see, sums, counts) for kind, sums in self._sums.items()}


def _see(sums: MatrixSums, counts: bool, layer: int, gradients_NC: Tensor) -> None:
    sums.add(layer, gram_matrix(widened(gradients_NC)) if counts else None)
