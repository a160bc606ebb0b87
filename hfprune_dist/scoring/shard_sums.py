"""Sums of the calibration pass over its shards.

First-order sums are added shard by shard, in order, and have the same bits on any number of ranks and after any resume.
Layers' matrices have the same bits on the same number of ranks, and are equal up to rounding on any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import DamagedFileError, load_tensors, save_tensors
from hfprune_dist.core.criterion import Criterion, losses_of
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.layer_sums import LayerSums, Size
from hfprune_dist.store.atomic_files import set_aside

# Names of the folders with sums of curvature and of weights' gradients.
CURVATURE, GRADIENTS = "curvature", "gradients"
# Average number of bytes that a rank may write per round for the layers' matrices: if it owns more than this, not every
# round is saved.
BYTES_SAVED_A_ROUND = 2**27


class KindSizes(NamedTuple):
    """Units of one kind in each layer of a model, those of all experts together; and the hidden size."""

    counts: tuple[int, ...]
    channels_per_unit: int
    hidden_size: int

    def of_layer(self, criterion: Criterion, layer: int) -> int:
        """Return the number of a criterion's sums for a layer."""
        return self.counts[layer] * criterion.sums_of_unit(self.channels_per_unit)

    def of_sums(self, criterion: Criterion) -> tuple[int, int]:
        """Return the shape of a criterion's sums, in which layers with fewer units than others are padded."""
        return len(self.counts), max(self.of_layer(criterion, layer) for layer in range(len(self.counts)))


@dataclass(frozen=True)
class SumsOfShard:
    """Sums over the micro-batches of one rank's shard.

    Attributes:
        kinds: kind of units -> criterion -> sums, float64 [num_layers, sums of units].
        losses: loss name -> sum over windows of the loss per token.
    """

    kinds: Mapping[str, Mapping[str, Tensor]]
    losses: Mapping[str, float]


class Accumulation:
    """Sums over the shards before ``next_shard``; ranks work on consecutive shards, one round at a time.

    Args:
        criteria: the criteria that observe something.
        sizes: kind -> its sizes, for each kind of units that is scored.
        shards: number of shards in the whole pass.
        file: file in which rank 0 saves after a round; if it exists, the pass resumes from it. A damaged file is set
            aside, and the pass starts over. The layers' matrices are saved next to it.
        weights: weights that units own: name within a layer -> size [out, in] in each layer. Their gradients are summed
            if a criterion needs them.

    Attributes:
        kinds: kind -> criterion -> sums, float64 [num_layers, sums of units] (``KindSizes.of_sums``).
        curvature: for each kind and layer, the sum over tokens of g g^T at the output projection's output; empty if no
            criterion needs moments.
        gradients: sums of weights' gradients; empty if no criterion needs them.
        losses: loss name -> sum over windows of the loss per token.
    """

    def __init__(
        self,
        criteria: Sequence[Criterion],
        sizes: Mapping[str, KindSizes],
        shards: int,
        file: Path,
        world: World,
        *,
        weights: Mapping[str, Sequence[Size]] | None = None,
    ) -> None:
        self.kinds = {
            kind: {it.name: torch.zeros(of_kind.of_sums(it)).double() for it in criteria if it.has_sums_of(kind)}
            for kind, of_kind in sizes.items()
        }
        self.losses = {loss.name: 0.0 for loss in losses_of(criteria)}
        self.next_shard = 0
        self.shards = shards
        self._sizes = sizes
        self._file = file
        self._world = world
        moments = sizes if any(it.needs_moments for it in criteria) else {}
        curvature = {kind: [(it.hidden_size,) * 2] * len(it.counts) for kind, it in moments.items()}
        self.curvature = LayerSums(curvature, file.parent / CURVATURE, world)
        needs_gradients = any(it.observes == "weight_gradients" for it in criteria)
        self.gradients = LayerSums((weights or {}) if needs_gradients else {}, file.parent / GRADIENTS, world)
        self._of_layers = [sums for sums in (self.curvature, self.gradients) if sums]
        self._rounds_unsaved = 0
        self._resume()

    @property
    def is_complete(self) -> bool:
        return self.next_shard >= self.shards

    @property
    def own_shard(self) -> int:
        """Shard of this rank in this round; ranks beyond the last shard repeat it, since forwards are collective."""
        return min(self.next_shard + self._world.rank, self.shards - 1)

    @property
    def num_counted(self) -> int:
        """Number of the ranks' shards that count in this round."""
        return min(self._world.size, self.shards - self.next_shard)

    @property
    def own_shard_counts(self) -> bool:
        """Whether this rank's shard counts in this round."""
        return self._world.rank < self.num_counted

    def add_round(self, shard: SumsOfShard) -> None:
        """Add the sums of every rank's shard of this round, and save if it is due; collective."""
        losses = self._world.all_gather(shard.losses)
        for sums in self._of_layers:
            sums.end_shard()
        for source in range(self.num_counted):
            for kind, of_kind in self.kinds.items():
                for name, sums_LN in of_kind.items():
                    received_LN = shard.kinds[kind][name].clone()
                    self._world.broadcast_tensor(received_LN, source)
                    sums_LN += received_LN
            self.losses = {name: value + losses[source][name] for name, value in self.losses.items()}
        self.next_shard += self.num_counted
        self._rounds_unsaved += 1
        owned = sum(sums.owned_bytes for sums in self._of_layers)
        if self.is_complete or self._rounds_unsaved >= -(-owned // BYTES_SAVED_A_ROUND):
            self.save()
        if self.is_complete:
            self._release()

    def save(self) -> None:
        """Save the state unless it is saved already. Collective.

        Each rank first saves its own layers' matrices, which become valid once rank 0 has saved the rest.

        Raises:
            UserError: if one of these is NaN or infinite.
        """
        if not self._rounds_unsaved:
            return
        for sums in self._of_layers:
            sums.require_finite()
            sums.save(self.next_shard)
        self._world.barrier()
        self._world.on_rank0(self._save)
        self._rounds_unsaved = 0

    def of_layer(self, kind: str, criterion: Criterion, layer: int) -> Tensor:
        """Return a criterion's sums for a layer's units or channels, float64; empty if it sums nothing."""
        if not criterion.has_sums_of(kind):
            return torch.zeros(0).double()
        return self.kinds[kind][criterion.name][layer, : self._sizes[kind].of_layer(criterion, layer)]

    def mean_curvature(self, kind: str, layer: int, tokens: int) -> Tensor:
        """Return the mean of g g^T over ``tokens`` tokens after the pass, if a criterion needs moments: float64
        [hidden_size, hidden_size], on the device.
        """
        return self.curvature.value(kind, layer, self.next_shard) / tokens

    def mean_gradient(self, weight: str, layer: int, windows: int) -> Tensor:
        """Return dL/dW of a layer's weight after the pass, with L the mean over ``windows`` windows, if a criterion
        needs it: float64 [out, in], on the device.
        """
        return self.gradients.value(weight, layer, self.next_shard).div_(windows)

    def _release(self) -> None:
        for sums in self._of_layers:
            sums.release()

    def _resume(self) -> None:
        saved: dict[str, Tensor] = {}  # on rank 0, which sends the others what they need of it
        problem = self._world.on_rank0(lambda: self._read(saved))
        self.next_shard = self._world.broadcast(int(saved["next_shard"]) if saved else 0)
        if not problem and self.next_shard:
            problems = self._world.all_gather([sums.resume(self.next_shard) for sums in self._of_layers])
            problem = next((it for of_rank in problems for it in of_rank if it), "")
        if problem:
            self._world.on_rank0(lambda: set_aside(self._file, problem))
            self.next_shard = 0
        if not self.next_shard or self.is_complete:
            self._release()
        if not self.next_shard:
            return
        self.losses = self._world.broadcast({name: float(saved.get(f"loss.{name}", 0.0)) for name in self.losses})
        for kind, of_kind in self.kinds.items():
            for name, sums_LN in of_kind.items():
                sums_LN.copy_(saved.get(f"{kind}.{name}", sums_LN))
                self._world.broadcast_tensor(sums_LN, 0)

    def _read(self, saved: dict[str, Tensor]) -> str:
        """Read what an earlier attempt at this pass saved, if there is anything; return what is wrong with it."""
        try:
            saved.update(load_tensors(self._file)[0] if self._file.is_file() else {})
        except DamagedFileError as error:
            return str(error)
        return ""

    def _save(self) -> None:
        sums = {f"{kind}.{name}": sums_LN for kind, it in self.kinds.items() for name, sums_LN in it.items()}
        losses = {f"loss.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.losses.items()}
        save_tensors({"next_shard": torch.tensor(self.next_shard), **losses, **sums}, self._file)
        for of_layers in self._of_layers:
            of_layers.keep_only(self.next_shard)
