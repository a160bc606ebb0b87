"""Second moments of the gradients at output projections' outputs, summed over all ranks as they appear in backward."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

from torch import Tensor

from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.core.unit_sums import SeeOutputGradients
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.layer_sums import LayerSums


class Curvature(LayerSums):
    """The sum of g g^T over tokens, for every layer and kind, with g the gradient at the output projection's output.

    Args:
        shapes: kind -> (num_layers, hidden_size).
        folder: parent folder of the saved states.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], folder: Path, world: World) -> None:
        super().__init__({kind: [(size, size)] * layers for kind, (layers, size) in shapes.items()}, folder, world)

    def seeing(self, *, counts: bool) -> Mapping[str, SeeOutputGradients]:
        """Return callbacks that add up gradients, for each kind; those of this rank are added only if ``counts``."""
        return {kind: partial(self._see, kind, counts) for kind in self.sizes}

    def _see(self, kind: str, counts: bool, layer: int, gradients_NC: Tensor) -> None:
        self.add(kind, layer, gram_matrix(gradients_NC) if counts else None)
