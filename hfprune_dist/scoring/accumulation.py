"""Sums of the calibration pass over its shards.

First-order sums are vectors that are added shard by shard, in order, and have the same bits on any number of ranks and
after any resume. Curvature and gradients of weights are matrices, one for each layer, which may be too large for one
host: for Llama-2-70B they take 43 and 548 GB. So the rank of a layer keeps and saves its sums. Where the matrices of
all layers fit, ranks add up their own terms until these are saved, or scored; otherwise terms are reduced as they
appear. These sums have the same bits on the same number of ranks, unless a signal has them saved early; they are then
equal up to rounding, as on any other number.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import SavedLayers, load_usable, save_tensors
from hfprune_dist.core.memory_limits import OWN_TERMS_BYTES
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.store.atomic_files import listed

# Name of the folder with layers' matrices: one folder in it for each state of the pass.
MATRICES = "matrices"
# Average number of bytes that a rank may write per round for the layers' matrices: if it owns more than this, not every
# round is saved.
BYTES_SAVED_A_ROUND = 2**27

# Rows and columns of a matrix.
Size = tuple[int, ...]


def bytes_of(matrices: Mapping[str, Sequence[Size]]) -> int:
    """Bytes of the sums of such matrices of all layers."""
    return torch.float64.itemsize * sum(math.prod(size) for sizes in matrices.values() for size in sizes)


class Accumulation:
    """Sums over the shards before ``next_shard``; ranks work on consecutive shards, one round at a time.

    Args:
        shards: number of shards in the whole pass.
        file: file in which rank 0 saves after a round; if it exists, the pass resumes from it, or starts over if
            it is damaged. The layers' matrices are saved next to it.
        matrices: name -> size in each layer, of the matrices that are summed.

    Attributes:
        sums: name -> sum, a float64 vector.
    """

    def __init__(self, shards: int, file: Path, world: World, matrices: Mapping[str, Sequence[Size]]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.matrices = matrices
        self.next_shard = 0
        self.shards = shards
        self._file = file
        self._world = world
        self._layers = range(max(map(len, matrices.values()), default=0))
        self._owned = self._layers[world.rank :: world.size]  # layers whose matrices this rank keeps
        self._totals: dict[tuple[str, int], Tensor] = {}  # of the layers owned
        self._in_memory = True  # unless an earlier attempt has saved the whole pass
        self._own_terms: dict[tuple[str, int], Tensor] = {}  # of all layers, since they were reduced
        self._has_own_terms = world.size > 1 and bytes_of(matrices) <= OWN_TERMS_BYTES
        owned = (size for of_layers in matrices.values() for size in of_layers[:: world.size])
        bytes_owned = torch.float64.itemsize * sum(map(math.prod, owned))  # at most, by any one rank
        self._rounds_per_save = -(-bytes_owned // BYTES_SAVED_A_ROUND)
        self._rounds_unsaved = 0
        self._resume()

    @property
    def is_complete(self) -> bool:
        return self.next_shard >= self.shards

    def add_round(self, score: Callable[[int, bool], Mapping[str, Tensor]]) -> None:
        """Add the sums of the next shards, one of each rank, and save if it is due; raises as ``save``. Collective.

        Ranks beyond the last shard repeat it, since forwards are collective; theirs doesn't count.

        Args:
            score: number of a shard, and whether it counts -> its sums, float64 vectors that have the same names and
                sizes on all ranks. Meanwhile, matrices are added to.
        """
        counted = min(self._world.size, self.shards - self.next_shard)
        shard = score(min(self.next_shard + self._world.rank, self.shards - 1), self._world.rank < counted)
        names = sorted(shard)
        own_N = torch.cat([shard[name] for name in names])
        for source in range(counted):
            received_N = own_N.clone()
            self._world.broadcast_tensor(received_N, source)
            for name, sum_N in zip(names, received_N.split([len(shard[name]) for name in names]), strict=True):
                self.sums[name] = self.sums.get(name, 0.0) + sum_N
        self.next_shard += counted
        self._rounds_unsaved += 1
        if self._rounds_unsaved >= self._rounds_per_save:
            self.save()
        elif self.is_complete:
            self._finish_sums()

    def add_to_matrix(self, name: str, layer: int, add: Callable[[Tensor], object] | None) -> None:
        """Add every rank's term of a micro-batch, or nothing; collective.

        Args:
            add: adds this rank's term to a float64 sum.
        """
        if self._world.size > 1 and not self._has_own_terms:
            term_RC = self._sum_of({}, name, layer)
            if add is not None:
                add(term_RC)
            self._reduce(name, layer, term_RC)
        elif add is not None:
            add(self._sum_of(self._own_terms if self._has_own_terms else self._totals, name, layer))

    def matrix(self, name: str, layer: int) -> Tensor:
        """Return the sum of a matrix of a layer that this rank owns, or the last saved one, float64 on the device."""
        if self._in_memory and layer in self._owned:
            return self._sum_of(self._totals, name, layer)
        # Not a view of the file, which is removed once a later state is saved, perhaps by another host.
        return self._saved().tensor(layer, name).to(self._world.device, copy=True)

    def save(self) -> None:
        """Save the state unless it is saved already. Collective.

        Each rank first saves its own layers' matrices, which become valid once rank 0 has saved the rest.

        Raises:
            UserError: as ``_finish_sums`` does.
        """
        if not self._rounds_unsaved:
            return
        self._finish_sums()
        for layer in self._owned:
            self._state.parent.mkdir(parents=True, exist_ok=True)
            self._saved().write(layer, {name: self._sum_of(self._totals, name, layer).cpu() for name in self.matrices})
        self._world.barrier()
        self._world.on_rank0(self._save_sums)
        self._rounds_unsaved = 0

    def _finish_sums(self) -> None:
        """Reduce the layers' matrices so far, and check them; collective.

        Raises:
            UserError: if one is NaN or infinite; on every rank, naming the layer in which a backward came to what isn't
                finite first.
        """
        if self._has_own_terms:
            for name, sizes in self.matrices.items():
                for layer in range(len(sizes)):
                    self._reduce(name, layer, self._sum_of(self._own_terms, name, layer))
            self._own_terms = {}
        finite = [total.sum().isfinite() for total in self._totals.values()]
        known = zip(self._totals, torch.stack(finite).tolist() if finite else (), strict=True)
        lost = [(layer, name) for (name, layer), is_finite in known if not is_finite]
        everywhere = [each for of_rank in self._world.all_gather(lost) for each in of_rank]
        if everywhere:
            layer, name = max(everywhere)
            raise UserError(
                f"importance: sums of {name} in layer {layer} are NaN or infinite; set importance.dtype=float32 "
                "if it isn't yet, else check the checkpoint's weights"
            )

    @property
    def _state(self) -> Path:
        return self._file.parent / MATRICES / str(self.next_shard)

    def _saved(self) -> SavedLayers:
        return SavedLayers(self._state, self._layers)

    def _reduce(self, name: str, layer: int, terms_RC: Tensor) -> None:
        """Add all ranks' terms to the sum of the rank that owns the layer; collective."""
        owner = layer % self._world.size
        self._world.reduce(terms_RC, owner)
        if owner == self._world.rank:
            self._sum_of(self._totals, name, layer).add_(terms_RC)

    def _sum_of(self, sums: dict[tuple[str, int], Tensor], name: str, layer: int) -> Tensor:
        """A layer's sum of a matrix among some, 0 at first."""
        if (name, layer) not in sums:
            sums[name, layer] = torch.zeros(self.matrices[name][layer], dtype=torch.float64, device=self._world.device)
        return sums[name, layer]

    def _save_sums(self) -> None:
        save_tensors({"next_shard": torch.tensor(self.next_shard), **self.sums}, self._file)
        for folder in listed(self._state.parent, "*"):
            if folder != self._state:  # of an earlier state; what fails to go now is left to a later save
                shutil.rmtree(folder, ignore_errors=True)

    def _resume(self) -> None:
        """Go on where an earlier attempt at this pass saved its state, if all of that is intact."""
        saved = self._world.on_rank0(lambda: load_usable(self._file))
        if saved is None:
            return
        self.next_shard = int(saved.pop("next_shard"))
        is_intact = all(self._saved().is_done(layer) for layer in self._owned)
        if not all(self._world.all_gather(is_intact)):
            self.next_shard = 0
            return
        self.sums = saved
        self._in_memory = False
        if not self.is_complete:
            places = [(name, layer) for name in self.matrices for layer in self._owned]
            self._totals, self._in_memory = {place: self.matrix(*place) for place in places}, True
