"""Sums of the calibration pass over its shards, with the same bits on any number of ranks and after any resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import DamagedFileError, load_tensors, save_tensors
from hfprune_dist.core.criteria import Criterion, losses_of
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.halves import CURVE, Halves
from hfprune_dist.scoring.kind_totals import KindTotals, Layout, Saved, Shape
from hfprune_dist.scoring.shard_scorer import Sums
from hfprune_dist.store.atomic_files import set_aside


class Accumulation:
    """Sums over the shards before ``next_shard``; ranks work on consecutive shards, a round at a time.

    Args:
        criteria: those with something to sum.
        shapes: of each kind of units that is scored. Halves are of the first: a layer may have too few others to be
            compared, and what else is scored must not change where a pass ends.
        shards: of the whole pass.
        file: where rank 0 saves after every round; if it is there, the pass goes on from it. One that is damaged, or of
            another pass, is set aside, and the pass begins anew.
        settled: stop as soon as both halves of the shards so far keep this share of their units in common, by every
            criterion that has halves and at every share; looked at when the number of shards is a power of two. None
            goes through all.

    Attributes:
        kinds: the sums of each kind.
        losses: loss name -> sum over windows of the loss per token.
    """

    def __init__(
        self,
        criteria: Sequence[Criterion],
        shapes: Mapping[str, Shape],
        shards: int,
        file: Path,
        world: World,
        *,
        settled: float | None = None,
    ) -> None:
        self.kinds = {kind: KindTotals(criteria, shape, shards, world) for kind, shape in shapes.items()}
        self.losses: dict[str, float] = {}
        self.next_shard = 0
        self.shards = shards
        self._first = next(iter(shapes))
        self._halves = Halves(criteria, shapes[self._first])
        self._sufficient_overlap = settled
        self._criteria = criteria
        self._file = file
        self._world = world
        self._resume()

    @property
    def is_complete(self) -> bool:
        return self.next_shard >= self.shards or self._has_settled()

    @property
    def mine(self) -> int:
        """The shard of this rank and round; ranks beyond the last shard repeat it, since forwards are collective."""
        return min(self.next_shard + self._world.rank, self.shards - 1)

    @property
    def curve(self) -> dict[tuple[int, str, float], float]:
        """(shards, criterion, share kept) -> overlap of the two halves (see ``core.split_half``)."""
        return self._halves.curve

    def add_round(self, shard: Sums) -> None:
        """Add the sums of every rank's shard of this round, and save.

        Raises:
            ExactOverflowError: where output gradients are out of all proportion.
        """
        counted = min(self._world.size, self.shards - self.next_shard)
        losses = self._world.gather(shard.losses)
        before = self.next_shard
        for source in range(counted):
            received = {kind: totals.add(shard.kinds[kind], source) for kind, totals in self.kinds.items()}
            self.losses = {name: self.losses.get(name, 0.0) + value for name, value in losses[source].items()}
            self._halves.add(self.next_shard, received[self._first])
            self.next_shard += 1
            self._halves.compare(self.next_shard, self.kinds[self._first].sums)
            if self._has_settled():
                break
        counts = self._world.rank < self.next_shard - before
        for kind, totals in self.kinds.items():
            totals.add_curvature(shard.kinds[kind].curvature_LCC, counts)
        if self._world.is_first:
            self._save()

    def _has_settled(self) -> bool:
        return self._sufficient_overlap is not None and self._halves.agree(self.next_shard, self._sufficient_overlap)

    def _resume(self) -> None:
        saved = self._read_saved() if self._world.is_first else {}
        if saved:
            self.losses = {loss.name: float(saved[f"loss.{loss.name}"]) for loss in losses_of(self._criteria)}
            self.next_shard = int(saved["next_shard"])
        self.losses, self.next_shard = self._world.broadcast((self.losses, self.next_shard))
        if self.next_shard:
            self._halves.resume(saved, self._world)
            for kind, totals in self.kinds.items():
                totals.resume({name: saved[self._name(kind, name)] for name in totals.layout()} if saved else {})

    def _name(self, kind: str, name: str) -> str:
        """Of a saved tensor; the first kind's have none in front."""
        return name if kind == self._first else f"{kind}.{name}"

    def _read_saved(self) -> Saved:
        """What an earlier attempt at this pass saved; empty where there is nothing, or nothing that can be used."""
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
        """Why these tensors can't have been saved by this pass; empty where they can."""
        expected = self._expected()
        found: Layout = {name: (it.dtype, tuple(it.shape)) for name, it in saved.items()}
        points = found.pop(CURVE, None)
        different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if different:
            return f"is of another pass, which differs in {different[0]}"
        if points is None or not self._halves.is_curve(saved[CURVE]):
            return f"is of another pass, which differs in its {CURVE}"
        if not 1 <= int(saved["next_shard"]) <= self.shards:
            return f"is of another pass, which has {int(saved['next_shard'])} shards so far; here are {self.shards}"
        return ""

    def _expected(self) -> Layout:
        """What a saved pass consists of, but for its curve, which grows."""
        of_kinds: Layout = {
            self._name(kind, name): it for kind, totals in self.kinds.items() for name, it in totals.layout().items()
        }
        losses: Layout = {f"loss.{loss.name}": (torch.float64, ()) for loss in losses_of(self._criteria)}
        return {"next_shard": (torch.int64, ()), **losses, **self._halves.layout(), **of_kinds}

    def _save(self) -> None:
        of_kinds = {
            self._name(kind, name): it for kind, totals in self.kinds.items() for name, it in totals.saved().items()
        }
        losses = {f"loss.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.losses.items()}
        saved = {"next_shard": torch.tensor(self.next_shard), **losses, **self._halves.saved(), **of_kinds}
        save_tensors(saved, self._file)
