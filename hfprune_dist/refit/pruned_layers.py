"""The layers of a pruned model that isn't written yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.models.single_layer import LayerReader, put_weights, weights_kept
from hfprune_dist.structures.kept import Kept


class PrunedLayers:
    """Makes layers of a checkpoint into those of the pruned model.

    Args:
        kept: what stays of the checkpoint.
        replacements: name of a tensor of the checkpoint -> function that reads what the pruned model has in its place.
        dtype: dtype of weights and activations.

    Attributes:
        checkpoint: the one that is pruned.
        numbers: of the layers that stay, in order.
        reader: of the checkpoint's layers; ``change`` makes one of them the pruned model's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: Kept,
        replacements: Mapping[str, Callable[[], Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        self.numbers = kept.layers
        self.reader = LayerReader(checkpoint, dtype, device)
        self._kept = kept
        self._replacements = replacements
        self._dtype = dtype
        self._device = device

    def change(self, number: int, layer: nn.Module) -> None:
        """Give a layer, after its number, the pruned model's weights."""
        for kind in self._kept.units:
            units, kept = self.checkpoint.structures[kind], self._kept.of_layer(number, kind)
            put_weights(layer, weights_kept(layer, units, kept))
        prefix = f"{self.checkpoint.family.layers}.{number}."
        new = {name.removeprefix(prefix): it for name, it in self._replacements.items() if name.startswith(prefix)}
        put_weights(layer, {name: read().to(self._device, self._dtype) for name, read in new.items()})
