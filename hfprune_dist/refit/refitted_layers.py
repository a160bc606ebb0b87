"""Refitted layers on disk: what a refit has done so far, for all ranks and for later attempts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.tensor_files import is_usable, save_tensors
from hfprune_dist.models.single_layer import output_of, put_weights
from hfprune_dist.store.atomic_files import read_json, set_aside, write_json


@dataclass(frozen=True)
class LayerFit:
    """What least squares did to one layer's output projection.

    Attributes:
        ridge: chosen on held-out windows.
        error_before: the share of its target's energy that is lost before the refit.
        error_after: the share that is still lost after least squares.
    """

    ridge: float
    error_before: float
    error_after: float


class RefittedLayers:
    """Two files per layer: its new weights, then a report, whose presence says that the layer is done.

    Args:
        whole_mlp: whether row projections are refitted too, not the output projection alone.
        folder: written by one rank and read by all.
    """

    def __init__(self, checkpoint: Checkpoint, whole_mlp: bool, folder: Path) -> None:
        self._checkpoint = checkpoint
        self._units = checkpoint.units
        self._whole_mlp = whole_mlp
        self._folder = folder

    def done(self) -> set[int]:
        """Layers that are done. Files that are damaged are set aside, and their layers are not."""
        return {number for number in range(self._checkpoint.num_layers) if self._is_done(number)}

    def write(self, number: int, tensors: Sequence[Tensor], fit: LayerFit) -> None:
        """Publish a layer: its row projections and the output projection, or that one alone, rounded to the
        checkpoint's dtypes.
        """
        self._folder.mkdir(exist_ok=True)
        fitted = zip(self._names(number), tensors, strict=True)
        rounded = {name: tensor.to(self._dtype(name)).cpu().contiguous() for name, tensor in fitted}
        save_tensors(rounded, self._weight_file(number))  # before the report that says they are there
        write_json(self._report_file(number), asdict(fit))

    def install(self, number: int, layer: nn.Module) -> None:
        """Give a pruned layer its refitted weights."""
        like = output_of(layer, self._units).weight
        prefix = self._units.tensor(number, "")
        read = {name.removeprefix(prefix): self._read(number, name) for name in self._names(number)}
        put_weights(layer, {name: weight.to(like) for name, weight in read.items()})

    def reports(self) -> list[LayerFit]:
        """Of all layers, once they are done."""
        return [LayerFit(**read_json(self._report_file(number))) for number in range(self._checkpoint.num_layers)]

    def replacements(self) -> dict[str, Callable[[], Tensor]]:
        """Name of every refitted tensor -> reads it."""
        return {
            name: partial(self._read, number, name)
            for number in range(self._checkpoint.num_layers)
            for name in self._names(number)
        }

    def _is_done(self, number: int) -> bool:
        report = self._report_file(number)
        try:
            LayerFit(**(read_json(report) or {}))
        except (ValueError, TypeError):
            if report.is_file():
                set_aside(report, "is no report of ours")
            return False
        return is_usable(self._weight_file(number))

    def _names(self, number: int) -> list[str]:
        """Tensors of a layer that the refit changes, in the order of ``MlpWeights`` where there are three."""
        rows = self._units.row_weights(number) if self._whole_mlp else []
        return [*rows, self._units.output_weight(number)]

    def _read(self, number: int, name: str) -> Tensor:
        with safe_open(self._weight_file(number), framework="pt") as source:
            tensor: Tensor = source.get_tensor(name)
        return tensor

    def _dtype(self, name: str) -> torch.dtype:
        """The dtype of a tensor in the checkpoint's files."""
        names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
        return names[self._checkpoint.tensors[name].dtype]

    def _weight_file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.safetensors"

    def _report_file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.json"
