"""Sums of the calibration pass for one kind of units, with the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hfprune_dist.core.criteria import Criterion
from hfprune_dist.core.exact_sums import ExactGram
from hfprune_dist.core.unit_sums import KindSums
from hfprune_dist.distributed.world import World

Saved = dict[str, Tensor]
# Name of a saved tensor -> its dtype and shape.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


class Shape(NamedTuple):
    """Of a model, as one kind of its units has it: units of each layer, and what their output projections put out."""

    counts: tuple[int, ...]
    channels_per_unit: int
    hidden_size: int

    @property
    def layers(self) -> int:
        return len(self.counts)

    @property
    def units(self) -> int:
        """Of the layer that has most."""
        return max(self.counts)

    def of_sums(self, criterion: Criterion) -> tuple[int, int]:
        """(layers, units), or channels where the criterion ``is_of_channels``."""
        return self.layers, self.units * self._numbers_of_unit(criterion)

    def own(self, criterion: Criterion, layer: int) -> int:
        """How many of these numbers, the first ones, are a layer's own."""
        return self.counts[layer] * self._numbers_of_unit(criterion)

    def _numbers_of_unit(self, criterion: Criterion) -> int:
        return self.channels_per_unit if criterion.is_of_channels else 1


class KindTotals:
    """What all shards so far add up to.

    Args:
        criteria: those with something to sum.
        shards: of the whole pass.

    Attributes:
        sums: criterion -> float64 [num_layers, units], or channels (``Shape.of_sums``), added in shard order; of
            criteria that are accumulated in a narrower dtype, micro-batch by micro-batch, and rounded to it each time.
            Layers with fewer units than others have zeros behind theirs.
    """

    def __init__(self, criteria: Sequence[Criterion], shape: Shape, shards: int, world: World) -> None:
        self.sums = {it.name: torch.zeros(shape.of_sums(it), dtype=torch.float64) for it in criteria}
        self._criteria = criteria
        self._shape = shape
        self._world = world
        needs_moments = any(it.needs_moments for it in criteria)
        self._curvature = CurvatureSums((shape.layers, shape.hidden_size), shards, world) if needs_moments else None

    def add(self, shard: KindSums, source: int) -> dict[str, Tensor]:
        """Add one rank's shard; collective.

        Args:
            shard: this rank's.
            source: the rank whose shard it is that counts.

        Returns:
            That shard's sums that aren't rounded, criterion -> float64, shaped as ``sums``.
        """
        exact = {name: sums_LN.clone() for name, sums_LN in shard.exact.items()}
        for name, received_LN in exact.items():
            self._world.broadcast_tensor(received_LN, source)
            self.sums[name] += received_LN
        if len(exact) < len(self.sums):
            self._add_rounded(self._world.broadcast(shard.terms, source))
        return exact

    def add_curvature(self, curvature_LCC: Tensor, counts: bool) -> None:
        """Add the round's shards of all ranks, this rank's if it ``counts``; where a criterion needs it. Collective.

        Raises:
            ExactOverflowError: where output gradients are out of all proportion.
        """
        if self._curvature is not None:
            self._curvature.add_round(curvature_LCC, counts)

    def of_layer(self, criterion: Criterion, layer: int) -> Tensor:
        """A criterion's sums over a layer's units or channels, float64; zeros where it sums nothing."""
        count = self._shape.own(criterion, layer)
        sums_LN = self.sums.get(criterion.name)
        return torch.zeros(count, dtype=torch.float64) if sums_LN is None else sums_LN[layer, :count]

    def mean_curvature(self, layer: int, tokens: int) -> Tensor:
        """Mean of g g^T over so many tokens, float64 [hidden_size, hidden_size], where a criterion needs moments."""
        assert self._curvature is not None, "no criterion needs moments"
        return self._curvature.value(layer) / tokens

    def saved(self) -> Saved:
        curvature = {} if self._curvature is None else self._curvature.saved()
        return {**{f"sums.{name}": sums_LN for name, sums_LN in self.sums.items()}, **curvature}

    def layout(self) -> Layout:
        """Of what ``saved`` tells."""
        sums: Layout = {f"sums.{name}": (it.dtype, tuple(it.shape)) for name, it in self.sums.items()}
        return {**sums, **({} if self._curvature is None else self._curvature.layout())}

    def resume(self, saved: Saved) -> None:
        """Go on from what ``saved`` told; rank 0 has it. Collective."""
        self.sums = self._world.broadcast({name: saved.get(f"sums.{name}", it) for name, it in self.sums.items()})
        if self._curvature is not None:
            self._curvature.resume(saved)

    def _add_rounded(self, terms: list[dict[str, Tensor]]) -> None:
        dtypes = {it.name: getattr(torch, it.accumulated_in) for it in self._criteria}
        for term in terms:
            for name, term_LN in term.items():
                dtype = dtypes[name]
                self.sums[name] = (self.sums[name].to(dtype) + term_LN.to(dtype)).double()


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

    def layout(self) -> Layout:
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
