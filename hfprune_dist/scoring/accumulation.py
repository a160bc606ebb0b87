"""Sums of the calibration pass over its shards.

First-order sums are added shard by shard, in order, and have the same bits on any number of ranks and after any resume.
Layers' matrices have the same bits on the same number of ranks, and are equal up to rounding on any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import load_usable, save_tensors
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.layer_sums import LayerSums, Size
from hfprune_dist.store.atomic_files import set_aside

# Name of the folder with layers' matrices.
MATRICES = "matrices"
# Average number of bytes that a rank may write per round for the layers' matrices: if it owns more than this, not every
# round is saved.
BYTES_SAVED_A_ROUND = 2**27


class Accumulation:
    """Sums over the shards before ``next_shard``; ranks work on consecutive shards, one round at a time.

    Args:
        shards: number of shards in the whole pass.
        file: file in which rank 0 saves after a round; if it exists, the pass resumes from it. A damaged file is set
            aside, and the pass starts over. The layers' matrices are saved next to it.
        matrices: name -> size in each layer, of matrices that are summed as well.

    Attributes:
        sums: name -> sum, float64.
        matrices: the layers' matrices.
    """

    def __init__(self, shards: int, file: Path, world: World, matrices: Mapping[str, Sequence[Size]]) -> None:
        self.sums: dict[str, Tensor] = {}
        self.matrices = LayerSums(matrices, file.parent / MATRICES, world)
        self.next_shard = 0
        self.shards = shards
        self._file = file
        self._world = world
        self._rounds_unsaved = 0
        self._resume()

    @property
    def is_complete(self) -> bool:
        return self.next_shard >= self.shards

    def add_round(self, score: Callable[[int, bool], Mapping[str, Tensor]]) -> None:
        """Add the sums of the next shards, one of each rank, and save if it is due. Collective.

        Ranks beyond the last shard repeat it, since forwards are collective; theirs doesn't count.

        Args:
            score: number of a shard, and whether it counts -> its sums, float64 vectors that have the same names and
                sizes on all ranks.
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
        if self.is_complete or self._rounds_unsaved >= -(-self.matrices.owned_bytes // BYTES_SAVED_A_ROUND):
            self.save()
        if self.is_complete:
            self.matrices.release()

    def save(self) -> None:
        """Save the state unless it is saved already. Collective.

        Each rank first saves its own layers' matrices, which become valid once rank 0 has saved the rest.

        Raises:
            UserError: if one of these is NaN or infinite.
        """
        if not self._rounds_unsaved:
            return
        self.matrices.require_finite()
        self.matrices.save(self.next_shard)
        self._world.barrier()
        self._world.on_rank0(self._save)
        self._rounds_unsaved = 0

    def _resume(self) -> None:
        """Go on where an earlier attempt at this pass saved its state, if all of that is intact."""
        saved = self._world.on_rank0(lambda: load_usable(self._file)) or {}
        if saved and not all(self._world.all_gather(self.matrices.resume(int(saved["next_shard"])))):
            self._world.on_rank0(lambda: set_aside(self._file, "goes with matrices that can't be read"))
            saved = {}
        if saved:
            self.next_shard = int(saved.pop("next_shard"))
            self.sums = saved
        if not saved or self.is_complete:
            self.matrices.release()

    def _save(self) -> None:
        save_tensors({"next_shard": torch.tensor(self.next_shard), **self.sums}, self._file)
        self.matrices.drop_earlier()
