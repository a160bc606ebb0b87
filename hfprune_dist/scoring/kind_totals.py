"""Totals of the calibration pass for one kind of units, with the same bits on any number of ranks."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hfprune_dist.core.criteria import Criterion
from hfprune_dist.core.scored_units import scores_units
from hfprune_dist.core.unit_sums import KindSums
from hfprune_dist.distributed.world import World
from hfprune_dist.structures import EXPERTS, NEURONS

Saved = dict[str, Tensor]
# Name of a saved tensor -> its dtype and shape.
Layout = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def scored_by(criteria: Sequence[Criterion], kind: str, experts: int = 1) -> list[Criterion]:
    """Return the criteria that have scores for a kind of units, in layers with ``experts`` experts."""
    scores = partial(scores_units, are_neurons=kind == NEURONS, are_experts=kind == EXPERTS, experts=experts)
    return list(filter(scores, criteria))


class KindSizes(NamedTuple):
    """Sizes of a model for one kind of its units: units of each layer, and the width of their projections' outputs.

    With experts, a layer's units are those of its first expert (or that expert itself), then those of its second, and
    so on.
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
        """Number of units in the layer that has the most."""
        return max(self.counts)

    def of_sums(self, criterion: Criterion) -> tuple[int, int]:
        """Return the shape of a criterion's sums: (layers, sums of units)."""
        return self.layers, self.units * criterion.sums_of_unit(self.channels_per_unit)

    def own(self, criterion: Criterion, layer: int) -> int:
        """Return how many of a layer's sums, from the first on, are its own; the rest is padding."""
        return self.counts[layer] * criterion.sums_of_unit(self.channels_per_unit)


class KindTotals:
    """Sums over all shards so far.

    Args:
        criteria: the criteria that have something to sum.

    Attributes:
        sums: criterion -> float64 [num_layers, sums of units] (``KindSizes.of_sums``), added in shard order.
            Layers with fewer units than others are padded with zeros.
        experts: number of experts among which a layer's units are divided equally.
    """

    def __init__(self, criteria: Sequence[Criterion], sizes: KindSizes, world: World) -> None:
        self.sums = {it.name: torch.zeros(sizes.of_sums(it), dtype=torch.float64) for it in criteria}
        self.experts = sizes.experts
        self._sizes = sizes
        self._world = world

    def add(self, shard: KindSums, source: int) -> None:
        """Add one rank's shard; collective.

        Args:
            shard: this rank's own shard.
            source: the rank whose shard is added.
        """
        for name, sums_LN in shard.exact.items():
            received_LN = sums_LN.clone()
            self._world.broadcast_tensor(received_LN, source)
            self.sums[name] += received_LN

    def of_layer(self, criterion: Criterion, layer: int) -> Tensor:
        """Return a criterion's sums for a layer's units or channels, float64; zeros if it sums nothing."""
        count = self._sizes.own(criterion, layer)
        sums_LN = self.sums.get(criterion.name)
        return torch.zeros(count, dtype=torch.float64) if sums_LN is None else sums_LN[layer, :count]

    def saved(self) -> Saved:
        return {f"sums.{name}": sums_LN for name, sums_LN in self.sums.items()}

    def layout(self) -> Layout:
        """Return the layout of what ``saved`` returns."""
        return {f"sums.{name}": (it.dtype, tuple(it.shape)) for name, it in self.sums.items()}

    def resume(self, saved: Saved) -> None:
        """Restore what ``saved`` returned; only rank 0 has it. Collective."""
        for name, sums_LN in self.sums.items():
            sums_LN.copy_(saved.get(f"sums.{name}", sums_LN))
            self._world.broadcast_tensor(sums_LN, 0)
