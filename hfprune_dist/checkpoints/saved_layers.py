"""Saved tensors of finished layers, from which a later attempt resumes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import is_usable, load_tensors, save_tensors


class SavedLayers:
    """Tensors of finished layers, one file per layer, written by the rank that solved the layer.

    Args:
        layers: numbers of all layers that there will be.
    """

    def __init__(self, folder: Path, layers: Iterable[int]) -> None:
        self._folder = folder
        self._layers = tuple(layers)

    def done(self) -> set[int]:
        """Layers that have a file; damaged ones are set aside."""
        return {number for number in self._layers if self.is_done(number)}

    def write(self, number: int, tensors: Mapping[str, Tensor]) -> None:
        """Save the tensors of one layer, under names that no other layer uses."""
        self._folder.mkdir(exist_ok=True)
        save_tensors(tensors, self._file(number))

    def read(self) -> dict[str, Tensor]:
        """The tensors of all layers."""
        files = [load_tensors(self._file(number))[0] for number in self._layers]
        return {name: tensor for tensors in files for name, tensor in tensors.items()}

    def tensor(self, number: int, name: str) -> Tensor:
        """One tensor of a finished layer, without reading the others."""
        with safe_open(self._file(number), framework="pt") as source:
            found: Tensor = source.get_tensor(name)
        return found

    def is_done(self, number: int) -> bool:
        """Whether a layer has a file; a damaged one is set aside."""
        return is_usable(self._file(number))

    def _file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.safetensors"
