"""Sums of the calibration pass for one kind of units, with the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from hfprune_dist.core.criteria import Criterion
from hfprune_dist.core.unit_sums import KindSums
from hfprune_dist.distributed.world import World
from hfprune_dist.structures import EXPERTS, NEURONS

Saved = dict[str, Tensor]
# Name of a saved tensor -> its dtype and shape.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def scored_by(criteria: Sequence[Criterion], kind: str, experts: int = 1) -> list[Criterion]:
    """Those that have scores for this kind of units, of so many experts in each layer."""
    if kind == EXPERTS:
        return [criterion for criterion in criteria if criterion.is_of_whole_experts]
    others = [criterion for criterion in criteria if not criterion.is_of_whole_experts_alone]
    of_kind = [criterion for criterion in others if kind == NEURONS or not criterion.is_of_neurons]
    return [criterion for criterion in of_kind if experts == 1 or criterion.is_of_experts]


class Shape(NamedTuple):
    """Of a model, as one kind of its units has it: units of each layer, and what their output projections put out.

    Where they are of experts, a layer's units are those of its first expert, or that expert, then those of its second,
    and so on.
    """

    counts: tuple[int, ...]
    channels_per_unit: int
    hidden_size: int
    experts: int = 1

    @property
    def layers(self) -> int:
        return len(self.counts)

    @property
    def units(self) -> int:
        """Of the layer that has most."""
        return max(self.counts)

    def of_sums(self, criterion: Criterion) -> tuple[int, int]:
        """(layers, sums of units)."""
        return self.layers, self.units * criterion.sums_of_unit(self.channels_per_unit)

    def own(self, criterion: Criterion, layer: int) -> int:
        """How many of these numbers, the first ones, are a layer's own."""
        return self.counts[layer] * criterion.sums_of_unit(self.channels_per_unit)


class KindTotals:
    """What all shards so far add up to.

    Args:
        criteria: those with something to sum.

    Attributes:
        sums: criterion -> float64 [num_layers, sums of units] (``Shape.of_sums``), added in shard order;
            of criteria that are accumulated in a narrower dtype, micro-batch by micro-batch, and rounded to it each
            time. Layers with fewer units than others have zeros behind theirs.
        experts: of which a layer's units are equal parts.
    """

    def __init__(self, criteria: Sequence[Criterion], shape: Shape, world: World) -> None:
        self.sums = {it.name: torch.zeros(shape.of_sums(it), dtype=torch.float64) for it in criteria}
        self.experts = shape.experts
        self._criteria = criteria
        self._shape = shape
        self._world = world

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

    def of_layer(self, criterion: Criterion, layer: int) -> Tensor:
        """A criterion's sums over a layer's units or channels, float64; zeros where it sums nothing."""
        count = self._shape.own(criterion, layer)
        sums_LN = self.sums.get(criterion.name)
        return torch.zeros(count, dtype=torch.float64) if sums_LN is None else sums_LN[layer, :count]

    def saved(self) -> Saved:
        return {f"sums.{name}": sums_LN for name, sums_LN in self.sums.items()}

    def layout(self) -> Layout:
        """Of what ``saved`` tells."""
        return {f"sums.{name}": (it.dtype, tuple(it.shape)) for name, it in self.sums.items()}

    def resume(self, saved: Saved) -> None:
        """Go on from what ``saved`` told; rank 0 has it. Collective."""
        for name, sums_LN in self.sums.items():
            sums_LN.copy_(saved.get(f"sums.{name}", sums_LN))
            self._world.broadcast_tensor(sums_LN, 0)

    def _add_rounded(self, terms: list[dict[str, Tensor]]) -> None:
        dtypes = {it.name: getattr(torch, it.accumulated_in) for it in self._criteria}
        for term in terms:
            for name, term_LN in term.items():
                dtype = dtypes[name]
                self.sums[name] = (self.sums[name].to(dtype) + term_LN.to(dtype)).double()
