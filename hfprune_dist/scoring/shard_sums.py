"""Sums of the calibration pass over its shards.

First-order sums are added shard by shard, in order, and have the same bits on any number of ranks and after any resume.
Layers' matrices have the same bits on the same number of ranks, and are equal up to rounding on any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import DamagedFileError, load_tensors, save_tensors
from hfprune_dist.core.criteria import Criterion, losses_of
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.curvature import Curvature
from hfprune_dist.scoring.kind_totals import KindSizes, KindTotals, Layout, Saved, scored_by
from hfprune_dist.scoring.layer_sums import Size
from hfprune_dist.scoring.shard_scorer import SumsOfShard
from hfprune_dist.scoring.weight_gradients import WeightGradients
from hfprune_dist.store.atomic_files import set_aside

# Names of the folders with sums of curvature and of weights' gradients.
CURVATURE, GRADIENTS = "curvature", "gradients"
# Average number of bytes that a rank may write per round for the layers' matrices: if it owns more than this, not every
# round is saved.
BYTES_SAVED_A_ROUND = 2**27


class Accumulation:
    """Sums over the shards before ``next_shard``; ranks work on consecutive shards, one round at a time.

    Args:
        criteria: the criteria that have something to sum.
        sizes: kind -> its sizes, for each kind of units that is scored.
        shards: number of shards in the whole pass.
        file: file in which rank 0 saves after a round; if it exists, the pass resumes from it. A file that is damaged
            or of another pass is set aside, and the pass starts over. The layers' matrices are saved next to it.
        weights: weights that units own: name within a layer -> size [out, in] in each layer. Their gradients are summed
            if a criterion needs them.

    Attributes:
        kinds: kind -> its sums.
        curvature: second moments of output gradients; empty if no criterion needs them.
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
        of_units = [criterion for criterion in criteria if criterion.has_sums_of_units]
        self.kinds = {kind: KindTotals(scored_by(of_units, kind, it.experts), it, world) for kind, it in sizes.items()}
        self.losses: dict[str, float] = {}
        self.next_shard = 0
        self.shards = shards
        self._first = next(iter(sizes))
        self._criteria = criteria
        self._file = file
        self._world = world
        moments = sizes if any(it.needs_moments for it in criteria) else {}
        curvature = {kind: (it.layers, it.hidden_size) for kind, it in moments.items()}
        self.curvature = Curvature(curvature, file.parent / CURVATURE, world)
        needed = weights if weights and any(it.needs_weight_gradients for it in criteria) else {}
        self.gradients = WeightGradients(needed, file.parent / GRADIENTS, world)
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
            for kind, totals in self.kinds.items():
                totals.add(shard.kinds[kind], source)
            self.losses = {name: self.losses.get(name, 0.0) + value for name, value in losses[source].items()}
        self.next_shard += self.num_counted
        self._rounds_unsaved += 1
        if self.is_complete or self._rounds_unsaved >= self._rounds_a_save():
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

    def _rounds_a_save(self) -> int:
        owned = sum(sums.owned_bytes for sums in self._of_layers)
        return max(1, -(-owned // BYTES_SAVED_A_ROUND))

    def _release(self) -> None:
        for sums in self._of_layers:
            sums.release()

    def _resume(self) -> None:
        saved: Saved = {}  # on rank 0; the others are sent what they need of it
        self._world.on_rank0(lambda: saved.update(self._read_saved()))
        saved = self._with_layers(saved)
        if saved:
            self.losses = {loss.name: float(saved[f"loss.{loss.name}"]) for loss in losses_of(self._criteria)}
            self.next_shard = int(saved["next_shard"])
        self.losses, self.next_shard = self._world.broadcast((self.losses, self.next_shard))
        if self.next_shard:
            for kind, totals in self.kinds.items():
                totals.resume({name: saved[self._name(kind, name)] for name in totals.layout()} if saved else {})
            if self.is_complete:
                self._release()

    def _with_layers(self, saved: Saved) -> Saved:
        """Return what rank 0 has read if every rank can resume from its layers' matrices, otherwise nothing."""
        if not self._of_layers:
            return saved
        shards = self._world.broadcast(int(saved["next_shard"]) if saved else 0)
        if not shards:
            return {}
        mine = next(filter(None, (sums.resume(shards) for sums in self._of_layers)), "")
        problem = next(filter(None, self._world.all_gather(mine)), "")
        if not problem:
            return saved
        for sums in self._of_layers:
            sums.release()
        self._world.on_rank0(lambda: set_aside(self._file, problem))
        return {}

    def _name(self, kind: str, name: str) -> str:
        """Return the name of a saved tensor; only kinds other than the first are part of it."""
        return name if kind == self._first else f"{kind}.{name}"

    def _read_saved(self) -> Saved:
        """Return what an earlier attempt at this pass saved; empty if there is nothing that can be used."""
        if not self._file.is_file():
            return {}
        saved: Saved = {}
        try:
            saved, _ = load_tensors(self._file)
            problem = self._mismatch(saved)
        except DamagedFileError as error:
            problem = str(error)
        if problem:
            set_aside(self._file, problem)
        return {} if problem else saved

    def _mismatch(self, saved: Mapping[str, Tensor]) -> str:
        """Return the reason why this pass can't have saved these tensors, or an empty string."""
        expected = self._expected()
        found: Layout = {name: (it.dtype, tuple(it.shape)) for name, it in saved.items()}
        different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if different:
            return f"is of another pass, which differs in {different[0]}"
        if not 1 <= int(saved["next_shard"]) <= self.shards:
            return f"is of another pass, which has {int(saved['next_shard'])} shards so far; here are {self.shards}"
        return ""

    def _expected(self) -> Layout:
        """Return the layout of a saved pass."""
        of_kinds: Layout = {
            self._name(kind, name): it for kind, totals in self.kinds.items() for name, it in totals.layout().items()
        }
        losses: Layout = {f"loss.{loss.name}": (torch.float64, ()) for loss in losses_of(self._criteria)}
        return {"next_shard": (torch.int64, ()), **losses, **of_kinds}

    def _save(self) -> None:
        of_kinds = {
            self._name(kind, name): it for kind, totals in self.kinds.items() for name, it in totals.saved().items()
        }
        losses = {f"loss.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.losses.items()}
        saved = {"next_shard": torch.tensor(self.next_shard), **losses, **of_kinds}
        save_tensors(saved, self._file)
        for sums in self._of_layers:
            sums.keep_only(self.next_shard)
