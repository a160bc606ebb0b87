"""Layers on disk whose attention has matrices of low rank, for all ranks and for later attempts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.modeling_pruned import in_two
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.models.single_layer import linear_of, part_of, put_weights, weights_kept
from hfprune_dist.structures.low_rank import FACTORS

KEPT = "kept"
# What helps against factors that are too large, besides another dtype.
OTHER_METHOD = "choose a method with another allocation"
# Name of a projection within a layer -> its factors, in the order in which they are applied.
Factors = Mapping[str, Sequence[Tensor]]


class LowRankLayers:
    """One file per layer, with the neurons that stay and the factors; its presence says that the layer is done.

    Args:
        checkpoint: the model that is pruned.
        projections: names, within a layer, of the projections that get a low rank.
        folder: written by one rank and read by all.
    """

    def __init__(self, checkpoint: Checkpoint, projections: Sequence[str], folder: Path) -> None:
        self._checkpoint = checkpoint
        self._projections = projections
        self._files = SavedLayers(folder, range(checkpoint.num_layers))

    def done(self) -> set[int]:
        """Numbers of the layers that are done. Damaged files are set aside, and their layers don't count."""
        return self._files.done()

    def rounded(self, number: int, factors: Factors) -> dict[str, Tensor]:
        """Round a layer's factors to the checkpoint's dtypes; on the CPU, by their names in the pruned model.

        Raises:
            UserError: as ``as_stored`` does.
        """
        tensors = {}
        for projection, pair in factors.items():
            like = self._name(number, f"{projection}.weight")
            for name, weight in zip(self._factors(number, projection), pair, strict=True):
                whole = as_stored(self._checkpoint, name, weight, like=like, otherwise=OTHER_METHOD)
                tensors[name] = whole.cpu().contiguous()
        return tensors

    def write(self, number: int, kept: Tensor, rounded: Mapping[str, Tensor]) -> None:
        """Publish a layer.

        Args:
            kept: ascending int64 indices of the neurons that stay.
            rounded: what ``rounded`` returns.
        """
        self._files.write(number, {KEPT: kept, **rounded})

    def kept(self, number: int) -> Tensor:
        """The neurons that stay in a layer that is done."""
        return self._files.tensor(number, KEPT)

    def install(self, number: int, layer: nn.Module) -> None:
        """Turn a layer that ``LayerReader`` has made from the checkpoint into what its file says."""
        put_weights(layer, weights_kept(layer, self._checkpoint.units, self.kept(number)))
        for projection in self._projections:
            whole = linear_of(layer, projection)
            pair = [self._files.tensor(number, name).to(whole.weight) for name in self._factors(number, projection)]
            with torch.device("meta"):
                two = in_two(whole, len(pair[0]))
            for linear, weight in zip(two, pair, strict=True):
                linear.weight = nn.Parameter(weight, requires_grad=False)
            two[-1].bias = whole.bias
            block, _, name = projection.rpartition(".")
            setattr(part_of(layer, block), name, two)

    def replacements(self) -> dict[str, Callable[[], Tensor]]:
        """Name of every factor of all layers -> function that reads it."""
        return {
            name: partial(self._files.tensor, number, name)
            for number in range(self._checkpoint.num_layers)
            for projection in self._projections
            for name in self._factors(number, projection)
        }

    def _factors(self, number: int, projection: str) -> list[str]:
        return [self._name(number, f"{projection}.{factor}.weight") for factor in FACTORS]

    def _name(self, number: int, name: str) -> str:
        return self._checkpoint.units.tensor(number, name)
