"""Sums of the calibration pass over its shards, with the same bits on any number of ranks and after any resume."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import DamagedFileError, load_tensors, save_tensors
from hfprune_dist.core.criteria import Criterion, losses_of
from hfprune_dist.core.exact_sums import ExactGram
from hfprune_dist.core.split_half import SHARES_KEPT, split_half_overlap
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.shard_scorer import Sums
from hfprune_dist.store.atomic_files import set_aside

CURVE = "curve"

Saved = dict[str, Tensor]
# Name of a saved tensor -> its dtype and shape.
Kinds = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Accumulation:
    """Sums over the shards before ``next_shard``; ranks work on consecutive shards, a round at a time.

    Args:
        criteria: those with something to sum.
        shape: (num_layers, units of each, hidden_size) of the model.
        shards: of the whole pass.
        file: where rank 0 saves after every round; if it is there, the pass goes on from it. One that is damaged, or of
            another pass, is set aside, and the pass begins anew.
        settled: stop as soon as both halves of the shards so far keep this share of their units in common, by every
            criterion that has halves and at every share; looked at when the number of shards is a power of two. None
            goes through all.

    Attributes:
        sums_KLU: float64 [criteria, num_layers, units], added in shard order; of criteria that are
            accumulated in a narrower dtype, micro-batch by micro-batch, and rounded to it each time.
        losses: loss name -> sum over windows of the loss per token.
        curve: (shards, criterion, share kept) -> overlap of the two halves (see ``core.split_half``).
    """

    def __init__(
        self,
        criteria: Sequence[Criterion],
        shape: tuple[int, int, int],
        shards: int,
        file: Path,
        world: World,
        *,
        settled: float | None = None,
    ) -> None:
        layers, units, hidden_size = shape
        self.sums_KLU = torch.zeros(len(criteria), layers, units, dtype=torch.float64)
        self.curve: dict[tuple[int, str, float], float] = {}
        self._odd_KLU = torch.zeros_like(self.sums_KLU)
        self._sufficient_overlap = settled
        self.losses: dict[str, float] = {}
        self.next_shard = 0
        self.shards = shards
        self._criteria = criteria
        self._rounded = [
            (number, getattr(torch, it.accumulated_in)) for number, it in enumerate(criteria) if it.is_rounded
        ]
        self._file = file
        self._world = world
        needs_moments = any(it.needs_moments for it in criteria)
        self._curvature = CurvatureSums((layers, hidden_size), shards, world) if needs_moments else None
        self._resume()

    @property
    def is_complete(self) -> bool:
        return self.next_shard >= self.shards or self._has_settled()

    @property
    def mine(self) -> int:
        """The shard of this rank and round; ranks beyond the last shard repeat it, since forwards are collective."""
        return min(self.next_shard + self._world.rank, self.shards - 1)

    def add_round(self, shard: Sums) -> None:
        """Add the sums of every rank's shard of this round, and save.

        Raises:
            ExactOverflowError: where output gradients are out of all proportion.
        """
        counted = min(self._world.size, self.shards - self.next_shard)
        losses = self._world.gather(shard.losses)
        before = self.next_shard
        for source in range(counted):
            received_KLU = shard.units_KLU.clone()
            self._world.broadcast_tensor(received_KLU, source)
            self.sums_KLU += received_KLU
            if self._rounded:
                self._add_rounded(self._world.broadcast(shard.terms_JLU, source))
            self.losses = {name: self.losses.get(name, 0.0) + value for name, value in losses[source].items()}
            if self.next_shard % 2:
                self._odd_KLU += received_KLU
            self.next_shard += 1
            self._look_at_halves()
            if self._has_settled():
                break
        if self._curvature is not None:
            self._curvature.add_round(shard.curvature_LCC, counts=self._world.rank < self.next_shard - before)
        if self._world.is_first:
            self._save()

    def mean_curvature(self, layer: int, tokens: int) -> Tensor:
        """Mean of g g^T over so many tokens, float64 [hidden_size, hidden_size], where a criterion needs moments."""
        assert self._curvature is not None, "no criterion needs moments"
        return self._curvature.value(layer) / tokens

    def _add_rounded(self, terms_JLU: list[Tensor]) -> None:
        for term_JLU in terms_JLU:
            for (number, dtype), term_LU in zip(self._rounded, term_JLU, strict=True):
                self.sums_KLU[number] = self.sums_KLU[number].to(dtype) + term_LU.to(dtype)

    def _look_at_halves(self) -> None:
        """Add a point to the curve after 2, 4, 8, ... shards."""
        if self.next_shard < 2 or self.next_shard & (self.next_shard - 1):
            return
        for criterion, sum_LU, odd_LU in zip(self._criteria, self.sums_KLU, self._odd_KLU, strict=True):
            if criterion.has_halves:
                for share in SHARES_KEPT:
                    overlap = split_half_overlap(sum_LU - odd_LU, odd_LU, share)
                    self.curve[self.next_shard, criterion.name, share] = overlap

    def _has_settled(self) -> bool:
        newest = [value for (shards, *_), value in self.curve.items() if shards == self.next_shard]
        return self._sufficient_overlap is not None and bool(newest) and min(newest) >= self._sufficient_overlap

    def _resume(self) -> None:
        saved = self._read_saved() if self._world.is_first else {}
        if saved:
            self.sums_KLU = torch.stack([saved[f"sums.{criterion.name}"] for criterion in self._criteria])
            self.losses = {loss.name: float(saved[f"loss.{loss.name}"]) for loss in losses_of(self._criteria)}
            self.next_shard = int(saved["next_shard"])
            self._odd_KLU = saved["odd"]
            self.curve = _curve_of(saved[CURVE], self._criteria)
        self.sums_KLU, self._odd_KLU, self.losses, self.next_shard, self.curve = self._world.broadcast(
            (self.sums_KLU, self._odd_KLU, self.losses, self.next_shard, self.curve)
        )
        if self._curvature is not None and self.next_shard:
            self._curvature.resume(saved)

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
        expected = self._kinds()
        found: Kinds = {name: (it.dtype, tuple(it.shape)) for name, it in saved.items()}
        points = found.pop(CURVE, None)
        different = sorted(name for name in {*expected, *found} if expected.get(name) != found.get(name))
        if different:
            return f"is of another pass, which differs in {different[0]}"
        if points is None or not _is_curve(saved[CURVE], len(self._criteria)):
            return f"is of another pass, which differs in its {CURVE}"
        if not 1 <= int(saved["next_shard"]) <= self.shards:
            return f"is of another pass, which has {int(saved['next_shard'])} shards so far; here are {self.shards}"
        return ""

    def _kinds(self) -> Kinds:
        """What a saved pass consists of, but for its curve, which grows."""
        sums = {f"sums.{it.name}": (torch.float64, tuple(self.sums_KLU.shape[1:])) for it in self._criteria}
        losses: Kinds = {f"loss.{loss.name}": (torch.float64, ()) for loss in losses_of(self._criteria)}
        curvature = {} if self._curvature is None else self._curvature.kinds()
        odd = {"odd": (torch.float64, tuple(self._odd_KLU.shape))}
        return {"next_shard": (torch.int64, ()), **sums, **losses, **odd, **curvature}

    def _save(self) -> None:
        sums = {f"sums.{it.name}": sum_LU.clone() for it, sum_LU in zip(self._criteria, self.sums_KLU, strict=True)}
        losses = {f"loss.{name}": torch.tensor(value, dtype=torch.float64) for name, value in self.losses.items()}
        curvature = {} if self._curvature is None else self._curvature.saved()
        places = [criterion.name for criterion in self._criteria]
        points = [[shards, places.index(name), share, value] for (shards, name, share), value in self.curve.items()]
        halves = {"odd": self._odd_KLU, CURVE: torch.tensor(points, dtype=torch.float64)}
        saved = {"next_shard": torch.tensor(self.next_shard), **sums, **losses, **halves, **curvature}
        save_tensors(saved, self._file)


def _is_curve(points_P4: Tensor, criteria: int) -> bool:
    """Whether these can be points of a curve: number of shards, place of the criterion, share kept, overlap."""
    if not len(points_P4):
        return True
    return points_P4.dim() == 2 and points_P4.shape[1] == 4 and bool((points_P4[:, 1] < criteria).all())


def _curve_of(points: Tensor, criteria: Sequence[Criterion]) -> dict[tuple[int, str, float], float]:
    return {(int(shards), criteria[int(place)].name, share): value for shards, place, share, value in points.tolist()}


class CurvatureSums:
    """The sum of g g^T of every layer; too large to travel shard by shard, so it is added up as exact integers.

    Args:
        shape: (num_layers, hidden_size) of the model.
        shards: of the whole pass.
    """

    FIRST, TOTAL = "curvature.first", "curvature.total"

    def __init__(self, shape: tuple[int, int], shards: int, world: World) -> None:
        self._shape = shape
        self._shards = shards
        self._world = world
        self._first_LC = torch.zeros(0)
        self._own: list[ExactGram] = []
        self._total_LCC = torch.zeros(0, dtype=torch.int64)

    def add_round(self, terms_LCC: Tensor, counts: bool) -> None:
        if not self._own:
            self._scale(terms_LCC.diagonal(dim1=1, dim2=2))
        if counts:
            for gram, term_CC in zip(self._own, terms_LCC, strict=True):
                gram.add(term_CC)
        self._total_LCC = torch.zeros(0)  # as large as what takes its place
        self._total_LCC = torch.stack([gram.total_DD for gram in self._own])
        self._world.add_up(self._total_LCC)

    def value(self, layer: int) -> Tensor:
        return self._own[layer].value_of(self._total_LCC[layer])

    def saved(self) -> Saved:
        return {self.FIRST: self._first_LC, self.TOTAL: self._total_LCC}

    def kinds(self) -> Kinds:
        """Of what ``saved`` tells."""
        layers, hidden_size = self._shape
        return {
            self.FIRST: (torch.float64, (layers, hidden_size)),
            self.TOTAL: (torch.int64, (layers, hidden_size, hidden_size)),
        }

    def resume(self, saved: Saved) -> None:
        """Go on from what ``saved`` told; rank 0 has it, and holds the sum of all ranks from here on."""
        self._scale(self._world.broadcast(saved.get(self.FIRST, self._first_LC)))
        self._total_LCC = self._world.broadcast(saved.get(self.TOTAL, self._total_LCC))
        if self._world.is_first:
            for gram, total_CC in zip(self._own, self._total_LCC, strict=True):
                gram.total_DD += total_CC

    def _scale(self, first_LC: Tensor) -> None:
        self._first_LC = first_LC.double().contiguous()
        self._world.broadcast_tensor(self._first_LC, 0)
        self._own = [ExactGram(first_C, self._shards) for first_C in self._first_LC]
