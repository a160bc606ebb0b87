"""Sums of matrices over all ranks, one for each layer, made of the terms that a backward computes.

They are too large to be sent shard by shard, or to fit one host: curvature of Llama-2-70B takes 43 GB, gradients of its
weights 548 GB. So each layer's sum is kept by the rank that owns the layer, which also saves it. Where all layers' sums
fit on every rank, ranks first add up their own terms of a shard; otherwise, terms are reduced as they appear.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import DamagedFileError, load_tensors, save_tensors
from hfprune_dist.core.memory_limits import LAYER_SUMS_BYTES
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import listed

TOTAL = "total"

# Rows and columns of a matrix.
Size = tuple[int, ...]


class LayerSums:
    """The sums of several matrices per layer, float64, and their files: one folder for each state of the pass, which
    becomes valid when another file refers to it; then the folder before it can be removed.

    Args:
        sizes: name of a matrix -> its size in each layer.
        folder: parent folder of the saved states.
    """

    def __init__(self, sizes: Mapping[str, Sequence[Size]], folder: Path, world: World) -> None:
        self.sizes = sizes
        self._folder = folder
        self._world = world
        self._totals: dict[tuple[str, int], Tensor] = {}  # of the layers that this rank owns
        self._of_shard: dict[tuple[str, int], Tensor] = {}  # of all layers; this rank's terms
        self._waits = self._bytes_of_every(1) <= LAYER_SUMS_BYTES

    def __bool__(self) -> bool:
        """Return whether there is anything to sum."""
        return bool(self.sizes)

    @property
    def owned_bytes(self) -> int:
        """Approximate largest size of what any one rank owns, in bytes."""
        return self._bytes_of_every(self._world.size)

    def add(self, name: str, layer: int, term: Tensor | None) -> None:
        """Add a micro-batch's float32 term, or nothing, to a layer's sum. All ranks do so in the same order."""
        if self._world.size > 1 and not self._waits:
            nothing = torch.zeros(self.sizes[name][layer], device=self._world.device)
            self._reduce(name, layer, nothing if term is None else term.float())
        elif term is not None:
            self._at(self._totals if self._world.size == 1 else self._of_shard, name, layer).add_(term)

    def end_shard(self) -> None:
        """Add up all ranks' terms, if that hasn't happened yet. Collective."""
        if self._world.size > 1 and self._waits:
            for name, of_layers in self.sizes.items():
                for layer in range(len(of_layers)):
                    self._reduce(name, layer, self._at(self._of_shard, name, layer))
            self._of_shard = {}

    def require_finite(self) -> None:
        """Check the sums so far. Collective.

        Raises:
            UserError: on every rank, naming the layer in which a backward came to what isn't finite first.
        """
        lost = [(layer, name) for (name, layer), total in self._totals.items() if not total.sum().isfinite()]
        everywhere = [it for of_rank in self._world.all_gather(lost) for it in of_rank]
        if everywhere:
            layer, name = max(everywhere)
            raise UserError(
                f"importance: gradients of {name} in layer {layer} are NaN or infinite; set importance.dtype=float32 "
                "if it isn't yet, else check the checkpoint's weights"
            )

    def release(self) -> None:
        """Free the sums, once they have been saved for the last time, or to begin anew."""
        self._totals = {}

    def save(self, shards: int) -> None:
        """Write what this rank owns, as the state after ``shards`` shards."""
        self._of(shards).mkdir(parents=True, exist_ok=True)
        for name, layer in self._owned():
            save_tensors({TOTAL: self._at(self._totals, name, layer).cpu()}, self._file(shards, name, layer))

    def resume(self, shards: int) -> str:
        """Read what this rank owns; return a description of what is wrong with it, or an empty string."""
        try:
            self._totals = {(name, layer): self.value(name, layer, shards) for name, layer in self._owned()}
        except DamagedFileError as error:
            return str(error)
        return ""

    def value(self, name: str, layer: int, shards: int) -> Tensor:
        """Return the saved sum of any layer after ``shards`` shards, float64 on the device.

        Raises:
            DamagedFileError: if its file is missing or can't be used.
        """
        file = self._file(shards, name, layer)
        try:
            total = load_tensors(file)[0][TOTAL]
        except (DamagedFileError, OSError) as error:
            raise DamagedFileError(f"goes with {file.name}, which can't be read ({error})") from None
        # Not a view of the file, which is removed once a later state is saved, perhaps by another host.
        return total.to(self._world.device, copy=True)

    def keep_only(self, shards: int) -> None:
        """Remove the states saved after any other number of shards; what fails to go now is left to a later call."""
        for folder in listed(self._folder, "*"):
            if folder != self._of(shards):
                shutil.rmtree(folder, ignore_errors=True)

    def _reduce(self, name: str, layer: int, sum_RC: Tensor) -> None:
        """Add all ranks' sums of some terms to a layer's total; collective."""
        owner = layer % self._world.size
        self._world.reduce(sum_RC, owner)
        if owner == self._world.rank:
            self._at(self._totals, name, layer).add_(sum_RC)

    def _at(self, sums: dict[tuple[str, int], Tensor], name: str, layer: int) -> Tensor:
        """A layer's sum among some, 0 at first."""
        if (name, layer) not in sums:
            sums[name, layer] = torch.zeros(self.sizes[name][layer], dtype=torch.float64, device=self._world.device)
        return sums[name, layer]

    def _owned(self) -> list[tuple[str, int]]:
        mine = slice(self._world.rank, None, self._world.size)
        return [(name, layer) for name, of_layers in self.sizes.items() for layer in range(len(of_layers))[mine]]

    def _bytes_of_every(self, step: int) -> int:
        """Bytes of the sums of every ``step``th layer."""
        return torch.float64.itemsize * sum(math.prod(it) for sizes in self.sizes.values() for it in sizes[::step])

    def _of(self, shards: int) -> Path:
        return self._folder / str(shards)

    def _file(self, shards: int, name: str, layer: int) -> Path:
        return self._of(shards) / f"{name}-{layer}.safetensors"
