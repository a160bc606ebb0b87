"""Scores of the layers that are finished, which a later attempt takes up."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import is_usable, load_tensors, save_tensors


class SavedScores:
    """Scores of finished layers, a file each, written by the rank that solved it."""

    def __init__(self, folder: Path, num_layers: int) -> None:
        self._folder = folder
        self._layers = range(num_layers)

    def done(self) -> set[int]:
        """Layers that have a file; damaged ones are set aside."""
        return {number for number in self._layers if is_usable(self._file(number))}

    def write(self, number: int, scores: dict[str, Tensor]) -> None:
        """Keep the scores of one layer, by their names in the artifact."""
        self._folder.mkdir(exist_ok=True)
        save_tensors(scores, self._file(number))

    def read(self) -> dict[str, Tensor]:
        """The scores of all layers."""
        files = [load_tensors(self._file(number))[0] for number in self._layers]
        return {name: scores_U for scores in files for name, scores_U in scores.items()}

    def _file(self, number: int) -> Path:
        return self._folder / f"layer-{number}.safetensors"
