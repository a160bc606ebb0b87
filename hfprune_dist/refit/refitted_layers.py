"""Refitted layers on disk: what a refit has done so far, for all ranks and for later attempts."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.models.single_layer import output_of, put_weights
from hfprune_dist.store.atomic_files import read_json, set_aside, write_json
from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class ProjectionFit:
    """What least squares did to one output projection, or to those of all experts of a layer.

    Attributes:
        ridge: chosen on held-out windows; for experts, the median.
        error_before: the share of its target's energy that is lost before the refit.
        error_after: the share that is still lost after least squares.
    """

    ridge: float
    error_before: float
    error_after: float


@dataclass(frozen=True)
class FittedProjection:
    """An output projection's new weight [hidden_size, kept], as stored in files, and a report of its fit.

    Attributes:
        energy: mean square of its targets.
    """

    weight_CK: Tensor
    fit: ProjectionFit
    energy: float


def fit_of_all(fitted: Sequence[FittedProjection]) -> ProjectionFit:
    """The fit of one projection; or of several together, weighted by the energies of their targets."""
    if len(fitted) == 1:
        return fitted[0].fit
    energy = sum(it.energy for it in fitted)
    lost_before = sum(it.energy * it.fit.error_before for it in fitted)
    lost_after = sum(it.energy * it.fit.error_after for it in fitted)
    ridge = statistics.median_low(it.fit.ridge for it in fitted)
    return ProjectionFit(ridge, *((lost_before / energy, lost_after / energy) if energy else (0.0, 0.0)))


def output_tensors(units: Units, weights_CK: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name within a layer -> tensor as stored in files, for the output projections of some units.

    Args:
        weights_CK: the weight of each expert [hidden_size, channels], or a single one.
    """
    first = units.output_columns[0]
    if first.stacked:
        whole = torch.stack([*weights_CK])
        return {first.tensor: whole if first.axis == 2 else whole.transpose(1, 2)}
    return {owned.tensor: it for owned, it in zip(units.output_columns, weights_CK, strict=True)}


# What helps against weights that are too large, besides another dtype.
OTHER_REFIT = "choose a method with another refit"

# Kind of units -> what least squares did to a layer's output projection that reads their channels.
LayerFit = Mapping[str, ProjectionFit]


class RefittedLayers:
    """Two files per layer: its new weights, then a report, whose presence says that the layer is done.

    Args:
        kinds: the kinds of units whose output projections are refitted, those of the MLP first.
        whole_mlp: whether the MLP's row projections are refitted too.
        folder: written by one rank and read by all.
    """

    def __init__(self, checkpoint: Checkpoint, kinds: Sequence[Units], whole_mlp: bool, folder: Path) -> None:
        self.kinds = kinds
        self.whole_mlp = whole_mlp
        self._checkpoint = checkpoint
        self._folder = folder
        self._files = SavedLayers(folder, range(checkpoint.num_layers))

    def kinds_of(self, number: int) -> list[Units]:
        """The kinds that have units in a layer."""
        return [units for units in self.kinds if units.counts[number]]

    def rounded_output(self, number: int, units: Units, expert: int, weight_CK: Tensor) -> Tensor:
        """Round the output projection of one expert, or the single one, as ``rounded`` does.

        Args:
            expert: its number; 0 for the single one.
        """
        first = units.output_columns[0]
        own = first if first.stacked else units.output_columns[expert]
        name, like = (units.tensor(number, it.tensor) for it in (own, first))
        return as_stored(self._checkpoint, name, weight_CK, like=like, otherwise=OTHER_REFIT).cpu()

    def done(self, layers: Sequence[int]) -> set[int]:
        """The layers, among these, that are done. Damaged files are set aside, and their layers don't count."""
        return {number for number in layers if self._is_done(number)}

    def rounded(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Round some of a layer's tensors, by their names within it, to the checkpoint's dtypes; on the CPU.

        Raises:
            UserError: as ``as_stored`` does.
        """
        return {name: self._rounded(number, name, tensor) for name, tensor in tensors.items()}

    def write(self, number: int, tensors: Mapping[str, Tensor], fit: LayerFit) -> None:
        """Publish a layer: its refitted tensors, by their names within it, rounded to the checkpoint's dtypes."""
        rounded = {self.kinds[0].tensor(number, name): it for name, it in self.rounded(number, tensors).items()}
        assert sorted(rounded) == sorted(self._names(number)), f"layer {number}: {sorted(rounded)}"
        self._files.write(number, rounded)  # before the report that says they are there
        write_json(self._report_file(number), {kind: asdict(it) for kind, it in fit.items()})

    def install(self, number: int, layer: nn.Module) -> None:
        """Give a pruned layer its refitted weights."""
        put_weights(layer, self.weights(number, like=output_of(layer, self.kinds[0]).weight))

    def weights(self, number: int, like: Tensor) -> dict[str, Tensor]:
        """A layer's refitted weights, by their names within it, with the dtype and on the device of another tensor."""
        prefix = self.kinds[0].tensor(number, "")
        return {name.removeprefix(prefix): self._files.tensor(number, name).to(like) for name in self._names(number)}

    def reports(self, layers: Sequence[int]) -> list[LayerFit]:
        """Reports of these layers, once they are done."""
        return [self._report(number) for number in layers]

    def replacements(self, layers: Sequence[int]) -> dict[str, Callable[[], Tensor]]:
        """Name of every refitted tensor of these layers -> function that reads it."""
        return {name: partial(self._files.tensor, number, name) for number in layers for name in self._names(number)}

    def _rounded(self, number: int, name: str, tensor: Tensor) -> Tensor:
        whole_name = self.kinds[0].tensor(number, name)
        return as_stored(self._checkpoint, whole_name, tensor, otherwise=OTHER_REFIT).cpu().contiguous()

    def _is_done(self, number: int) -> bool:
        try:
            self._report(number)
        except (ValueError, TypeError, KeyError):
            if self._report_file(number).is_file():
                set_aside(self._report_file(number), "is not a report of ours")
            return False
        return self._files.is_done(number)

    def _report(self, number: int) -> LayerFit:
        record = read_json(self._report_file(number)) or {}
        return {units.kind: ProjectionFit(**record[units.kind]) for units in self.kinds_of(number)}

    def _names(self, number: int) -> list[str]:
        """Names of the tensors of a layer that the refit changes."""
        rows = self.kinds[0].row_weights(number) if self.whole_mlp else []
        columns = [owned.tensor for units in self.kinds_of(number) for owned in units.output_columns]
        return [*rows, *(self.kinds[0].tensor(number, name) for name in columns)]

    def _report_file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.json"
