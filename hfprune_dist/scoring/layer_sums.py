"""Sums of matrices over all ranks, one for each layer, accumulated while a backward computes their terms.

They are too large to be sent shard by shard, or to fit one host: curvature of Llama-2-70B takes 22 GB, gradients of its
weights 548 GB. So each layer's matrix is rounded to integers in the backward that computes it, summed over all ranks on
their devices, and kept by the rank that owns the layer, which also saves it. Apart from what a rank owns, only one
matrix is alive at a time.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import DamagedFileError, load_tensors, save_tensors
from hfprune_dist.core.exact_sums import ExactOverflowError, GramScale, TensorScale
from hfprune_dist.distributed.world import World
from hfprune_dist.store.atomic_files import listed

TOTAL = "total"

Scale = GramScale | TensorScale
# Rows and columns of a matrix.
Size = tuple[int, ...]


class MatrixSums:
    """The sums over all micro-batches of one matrix per layer.

    Args:
        sizes: size of the matrix in each layer.
        scale: class that rounds terms to integers.
        micro_batches: number of micro-batches in the whole pass.
    """

    def __init__(self, sizes: Sequence[Size], scale: type[Scale], micro_batches: int, world: World) -> None:
        self._sizes = sizes
        self._scale = scale
        self._micro_batches = micro_batches
        self._world = world
        self._first: dict[int, Tensor] = {}
        self._scales: dict[int, Scale] = {}
        self._totals: dict[int, Tensor] = {}
        self._fits = torch.ones(len(sizes), dtype=torch.bool, device=world.device)

    @property
    def owned_bytes(self) -> int:
        """Largest size of what any one rank owns, in bytes."""
        numbers = [math.prod(self._scale.total_shape(size)) for size in self._sizes]
        return max(sum(numbers[rank :: self._world.size]) for rank in range(self._world.size)) * torch.int64.itemsize

    @property
    def first_shape(self) -> tuple[int, ...]:
        """Shape of what ``first`` returns."""
        return len(self._sizes), *self._scale.first_shape(self._sizes[0])

    def add(self, layer: int, term: Tensor | None) -> None:
        """Add all ranks' float32 or float64 terms of a micro-batch to a layer's sum; this rank adds nothing if its term
        is None. Collective.

        Rank 0's first term, which must not be None, determines the layer's scale. ``check`` says if a term could not be
        added.
        """
        scale = self._scales.get(layer) or self._begin(layer, term)
        owner = layer % self._world.size
        if term is not None:
            self._fits[layer] &= scale.holds(term)
        if self._world.size == 1:
            if term is not None:
                scale.add(term, self._total(layer))
            return
        total = self._nothing(layer)
        if term is not None:
            scale.add(term, total)
        del term  # the collective may need as much memory itself
        self._world.reduce(total, owner)
        if owner == self._world.rank:
            self._total(layer).add_(total)

    def check(self, name: str) -> None:
        """Check that all of this rank's terms were within the range of their scales.

        Args:
            name: what is summed, for the message.

        Raises:
            ExactOverflowError: naming the first layer of which they weren't.
        """
        if not self._fits.all():
            layer = self._fits.tolist().index(False)
            raise ExactOverflowError(f"gradients of {name} in layer {layer}: {self._scale.OUT_OF_RANGE}")

    def first(self) -> Tensor:
        """Return what determines the layers' scales: float64 [num_layers, ...]."""
        return torch.stack([self._first[layer].cpu() for layer in range(len(self._sizes))])

    def save(self, prefix: Path) -> None:
        """Write the totals of this rank's layers, one file per layer, with names that begin with ``prefix``."""
        for layer in self._owned():
            save_tensors({TOTAL: self._total(layer).cpu()}, _file(prefix, layer))

    def resume(self, first: Tensor, prefix: Path) -> None:
        """Restore what ranks saved, however many they were.

        Args:
            first: what ``first`` returned.

        Raises:
            DamagedFileError: if a file of this rank's layers is missing or can't be used.
        """
        self._first = {layer: of_layer.to(self._world.device) for layer, of_layer in enumerate(first)}
        self._scales = {layer: self._scale(it, self._micro_batches) for layer, it in self._first.items()}
        self._totals = {layer: self._read(prefix, layer) for layer in self._owned()}

    def release(self) -> None:
        """Free the totals, once they have been saved for the last time."""
        self._totals = {}

    def begin_anew(self) -> None:
        """Return to the state in which nothing has been added or restored."""
        self._first, self._scales, self._totals = {}, {}, {}

    def value(self, layer: int, prefix: Path) -> Tensor:
        """Return the saved sum of any layer, float64 on the device."""
        return self._scales[layer].value_of(self._read(prefix, layer))

    def _owned(self) -> Sequence[int]:
        return range(self._world.rank, len(self._sizes), self._world.size)

    def _begin(self, layer: int, term: Tensor | None) -> Scale:
        first = torch.zeros(self._scale.first_shape(self._sizes[layer]), dtype=torch.float64, device=self._world.device)
        if term is not None:
            first += self._scale.first_of(term)
        self._world.broadcast_tensor(first, 0)
        self._first[layer] = first
        self._scales[layer] = self._scale(first, self._micro_batches)
        return self._scales[layer]

    def _total(self, layer: int) -> Tensor:
        if layer not in self._totals:
            self._totals[layer] = self._nothing(layer)
        return self._totals[layer]

    def _nothing(self, layer: int) -> Tensor:
        return torch.zeros(self._scale.total_shape(self._sizes[layer]), dtype=torch.int64, device=self._world.device)

    def _read(self, prefix: Path, layer: int) -> Tensor:
        file = _file(prefix, layer)
        if not file.is_file():
            raise DamagedFileError(f"goes with {file.name}, which is missing")
        try:
            tensors, _ = load_tensors(file)
        except DamagedFileError as error:
            raise DamagedFileError(f"goes with {file.name}, which {error}") from None
        total = tensors.get(TOTAL, torch.zeros(0))
        if total.dtype != torch.int64 or tuple(total.shape) != self._scale.total_shape(self._sizes[layer]):
            raise DamagedFileError(f"goes with {file.name}, which is of another pass")
        # Not a view of the file, which is removed once a later state is saved, perhaps by another host.
        return total.to(self._world.device, copy=True)


class LayerSums:
    """Sums of several matrices per layer, and their files: one folder for each state of the pass, which becomes valid
    when another file refers to it; then the folder before it can be removed.

    Args:
        sums: name of the matrix -> its sums.
        folder: parent folder of the saved states.
    """

    def __init__(self, sums: Mapping[str, MatrixSums], folder: Path) -> None:
        self._sums = sums
        self._folder = folder

    def __bool__(self) -> bool:
        """Return whether there is anything to sum."""
        return bool(self._sums)

    @property
    def owned_bytes(self) -> int:
        """Approximate largest size of what any one rank owns, in bytes."""
        return sum(sums.owned_bytes for sums in self._sums.values())

    def check(self) -> None:
        """Check the terms of a micro-batch after it has been added.

        Raises:
            ExactOverflowError: if terms of this rank were out of range.
        """
        for name, sums in self._sums.items():
            sums.check(name)

    def release(self) -> None:
        """Free the sums, once they have been saved for the last time."""
        for sums in self._sums.values():
            sums.release()

    def begin_anew(self) -> None:
        """Return to the state in which nothing has been added or restored."""
        for sums in self._sums.values():
            sums.begin_anew()

    def first(self) -> dict[str, Tensor]:
        """Return what determines scales: name -> float64, with the shape in ``first_shapes``."""
        return {name: sums.first() for name, sums in self._sums.items()}

    def first_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of what ``first`` returns."""
        return {name: sums.first_shape for name, sums in self._sums.items()}

    def save(self, shards: int) -> None:
        """Write what this rank owns, as the state after ``shards`` shards."""
        self._of(shards).mkdir(parents=True, exist_ok=True)
        for name, sums in self._sums.items():
            sums.save(self._of(shards) / name)

    def resume(self, first: Mapping[str, Tensor], shards: int) -> str:
        """Read what this rank owns; return a description of what is wrong with it, or an empty string."""
        try:
            for name, sums in self._sums.items():
                sums.resume(first[name], self._of(shards) / name)
        except DamagedFileError as error:
            return str(error)
        return ""

    def value(self, name: str, layer: int, shards: int) -> Tensor:
        """Return the sum of any layer after ``shards`` shards, float64 on the device."""
        return self._sums[name].value(layer, self._of(shards) / name)

    def keep_only(self, shards: int) -> None:
        """Remove the states saved after any other number of shards; what fails to go now is left to a later call."""
        for folder in listed(self._folder, "*"):
            if folder != self._of(shards):
                shutil.rmtree(folder, ignore_errors=True)

    def _of(self, shards: int) -> Path:
        return self._folder / str(shards)


def _file(prefix: Path, layer: int) -> Path:
    return prefix.with_name(f"{prefix.name}-{layer}.safetensors")
