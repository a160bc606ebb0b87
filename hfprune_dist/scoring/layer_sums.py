"""Sums of matrices over all ranks, one for each layer, made of the terms that a backward computes.

They are too large to be sent shard by shard, or to fit one host: curvature of Llama-2-70B takes 43 GB, gradients of its
weights 548 GB. So terms are reduced as they appear, to the rank that owns the layer, which keeps and saves its sum.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import listed

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
        self._layers = range(max(map(len, sizes.values()), default=0))
        self._owned = self._layers[world.rank :: world.size]  # those whose sums this rank has
        self._totals: dict[tuple[str, int], Tensor] = {}
        self._go_to(0)

    @property
    def owned_bytes(self) -> int:
        """Approximate largest size of what any one rank owns, in bytes."""
        owned = (size for of_layers in self.sizes.values() for size in of_layers[:: self._world.size])
        return torch.float64.itemsize * sum(map(math.prod, owned))

    def add(self, name: str, layer: int, term_RC: Tensor | None) -> None:
        """Add every rank's float32 term of a micro-batch, or nothing, to a layer's sum. Collective."""
        size, owner = self.sizes[name][layer], layer % self._world.size
        if self._world.size > 1:
            term_RC = torch.zeros(size, device=self._world.device) if term_RC is None else term_RC
            term_RC = term_RC.double()
            self._world.reduce(term_RC, owner)
        if term_RC is not None and owner == self._world.rank:
            self._total(name, layer).add_(term_RC)

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
        self._go_to(shards)
        for layer in self._owned:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._saved.write(layer, {name: self._total(name, layer).cpu() for name in self.sizes})

    def resume(self, shards: int) -> bool:
        """Read what this rank owns; return whether all of it is intact. Damaged files are set aside."""
        self._go_to(shards)
        if not all(self._saved.is_done(layer) for layer in self._owned):
            return False
        self._totals = {(name, layer): self.value(name, layer) for layer in self._owned for name in self.sizes}
        return True

    def value(self, name: str, layer: int) -> Tensor:
        """Return the last saved sum of any layer, float64 on the device."""
        # Not a view of the file, which is removed once a later state is saved, perhaps by another host.
        return self._saved.tensor(layer, name).to(self._world.device, copy=True)

    def drop_earlier(self) -> None:
        """Remove all states but the last one; what fails to go now is left to a later call."""
        for folder in listed(self._folder, "*"):
            if folder != self._state:
                shutil.rmtree(folder, ignore_errors=True)

    def _go_to(self, shards: int) -> None:
        self._state = self._folder / str(shards)
        self._saved = SavedLayers(self._state, self._layers)

    def _total(self, name: str, layer: int) -> Tensor:
        """The sum of a layer that this rank owns, 0 at first."""
        if (name, layer) not in self._totals:
            zeros_RC = torch.zeros(self.sizes[name][layer], dtype=torch.float64, device=self._world.device)
            self._totals[name, layer] = zeros_RC
        return self._totals[name, layer]
