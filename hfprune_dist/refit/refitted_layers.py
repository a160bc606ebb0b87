"""Refitted layers on disk: what a refit has done so far, for all ranks and for later attempts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.models.single_layer import output_of, put_weights
from hfprune_dist.refit.least_squares_fit import ProjectionFit
from hfprune_dist.structures.units import Units

# What helps against weights that are too large, besides another dtype.
OTHER_REFIT = "choose a method with another refit"
# Kind of units -> what least squares did to a layer's output projection that reads their channels.
LayerFit = Mapping[str, ProjectionFit]


class RefittedLayers:
    """One file per layer: its new weights, by their names in the checkpoint, and a ``ProjectionFit`` for each kind.

    Args:
        kinds: the kinds of units whose output projections are refitted, those of the MLP first.
        whole_mlp: whether the MLP's row projections are refitted too.
        folder: written by one rank and read by all.
    """

    def __init__(self, checkpoint: Checkpoint, kinds: Sequence[Units], whole_mlp: bool, folder: Path) -> None:
        self.kinds = kinds
        self.whole_mlp = whole_mlp
        self._checkpoint = checkpoint
        self._files = SavedLayers(folder, range(checkpoint.num_layers))

    def kinds_of(self, number: int) -> list[Units]:
        """The kinds that have units in a layer."""
        return [units for units in self.kinds if units.counts[number]]

    def done(self) -> set[int]:
        """The layers that are done. Damaged files are set aside, and their layers don't count."""
        return self._files.done()

    def rounded(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round some of a layer's tensors, by their names within it, to the checkpoint's dtypes; on the CPU.

        Raises:
            UserError: as ``as_stored`` does.
        """
        rounded = partial(as_stored, self._checkpoint, otherwise=OTHER_REFIT)
        return {name: rounded(self._stored(number, name), it).cpu().contiguous() for name, it in tensors.items()}

    def write(self, number: int, tensors: Mapping[str, Tensor], fits: LayerFit) -> None:
        """Publish a layer: its refitted tensors, by their names within it, rounded to the checkpoint's dtypes."""
        assert sorted(tensors) == sorted(self._names(number)), f"layer {number}: {sorted(tensors)}"
        rounded = {self._stored(number, name): it for name, it in self.rounded(number, tensors).items()}
        reports = {f"fit.{kind}": torch.tensor(astuple(fit), dtype=torch.float64) for kind, fit in fits.items()}
        self._files.write(number, rounded | reports)

    def install(self, number: int, layer: nn.Module) -> None:
        """Give a pruned layer its refitted weights."""
        put_weights(layer, self.weights(number, like=output_of(layer, self.kinds[0]).weight))

    def weights(self, number: int, like: Tensor) -> dict[str, Tensor]:
        """A layer's refitted weights, by their names within it, with the dtype and on the device of another tensor."""
        stored = {name: self._stored(number, name) for name in self._names(number)}
        return {name: self._files.tensor(number, it).to(like) for name, it in stored.items()}

    def reports(self, layers: Sequence[int]) -> list[LayerFit]:
        """Reports of these layers, once they are done."""
        return [{units.kind: self._report(number, units.kind) for units in self.kinds_of(number)} for number in layers]

    def replacements(self, layers: Sequence[int]) -> dict[str, Callable[[], Tensor]]:
        """Name of every refitted tensor of these layers -> function that reads it."""
        names = [(number, self._stored(number, name)) for number in layers for name in self._names(number)]
        return {name: partial(self._files.tensor, number, name) for number, name in names}

    def _report(self, number: int, kind: str) -> ProjectionFit:
        return ProjectionFit(*self._files.tensor(number, f"fit.{kind}").tolist())

    def _stored(self, number: int, name: str) -> str:
        return self.kinds[0].tensor(number, name)

    def _names(self, number: int) -> list[str]:
        """Names, within a layer, of the tensors that the refit changes."""
        rows = self.kinds[0].weights[:-1] if self.whole_mlp else ()
        return [*rows, *(owned.tensor for units in self.kinds_of(number) for owned in units.columns)]
