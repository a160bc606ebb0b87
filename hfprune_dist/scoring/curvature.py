"""Second moments of the gradients at output projections' outputs, summed over all ranks where they appear."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.core.exact_sums import PackedGramScale
from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.core.unit_sums import SeeOutputGradients
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.layer_sums import LayerSums, MatrixSums


class Curvature(LayerSums):
    """The sum of g g^T over tokens, of every layer, g the gradient at the output of its output projection of each kind.

    Args:
        shapes: kind -> (num_layers, hidden_size).
        micro_batches: of the whole pass.
        folder: where folders of states are.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, int]], micro_batches: int, folder: Path, world: World) -> None:
        sums = {
            kind: MatrixSums([(hidden_size, hidden_size)] * num_layers, PackedGramScale, micro_batches, world)
            for kind, (num_layers, hidden_size) in shapes.items()
        }
        super().__init__(sums, folder)

    def seeing(self, *, counts: bool) -> Mapping[str, SeeOutputGradients]:
        """What adds up gradients, of each kind; this rank's if they count."""
        return {kind: partial(_see, sums, counts) for kind, sums in self._sums.items()}


def _see(sums: MatrixSums, counts: bool, layer: int, gradients_NC: Tensor) -> None:
    wide = torch.promote_types(gradients_NC.dtype, torch.float32)
    sums.add(layer, gram_matrix(gradients_NC.to(wide)) if counts else None)
