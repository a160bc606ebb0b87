"""Refitted layers on disk: what a refit has done so far, for all ranks and for later attempts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.core.devices import fetch, send
from hfprune_dist.models.single_layer import output_of, put_weights


class RefittedLayers(SavedLayers):
    """One file per layer: its new tensors, by their names in the checkpoint, and what else is known of it.

    Args:
        folder: written by rank 0 and read by all.
    """

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        super().__init__(folder, range(checkpoint.num_layers))
        self._checkpoint = checkpoint

    def rounded(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round some of a layer's tensors, by their names within it, to the checkpoint's dtypes; on any device.

        Raises:
            UserError: as ``as_stored`` does.
        """
        units, known = self._checkpoint.units, self._checkpoint.tensors
        rounded = {}
        for name, tensor in tensors.items():
            stored = units.tensor(number, name)
            like = stored if stored in known else units.tensor(number, f"{units.output}.weight")
            rounded[name] = as_stored(
                self._checkpoint, stored, tensor, like=like, otherwise="choose a method with another refit"
            )
        return rounded

    def write_rounded(self, number: int, tensors: Mapping[str, Tensor], **more: Tensor) -> None:
        """Publish a layer: its new tensors, by their names within it, rounded; and what else is to be kept."""
        prefix = self._checkpoint.units.tensor(number, "")
        rounded = {prefix + name: tensor for name, tensor in self.rounded(number, tensors).items()}
        self.write(number, fetch(rounded | more))

    def weights(self, number: int, like: Tensor) -> dict[str, Tensor]:
        """A layer's new tensors, by their names within it, with the dtype and on the device of another tensor."""
        prefix = self._checkpoint.units.tensor(number, "")
        names = [name for name in self.names(number) if name.startswith(prefix)]
        return {name.removeprefix(prefix): send(self.tensor(number, name), like.device).to(like) for name in names}

    def install(self, number: int, layer: nn.Module) -> None:
        """Give a pruned layer its refitted weights."""
        put_weights(layer, self.weights(number, like=output_of(layer, self._checkpoint.units).weight))

    def replacements(self, layers: Sequence[int]) -> dict[str, Callable[[], Tensor]]:
        """Name of every new tensor of these layers -> function that reads it."""
        return {
            name: partial(self.tensor, number, name)
            for number in layers
            for name in self.names(number)
            if name.startswith(self._checkpoint.units.tensor(number, ""))
        }
