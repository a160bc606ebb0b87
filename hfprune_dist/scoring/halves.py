"""Whether the kept set has settled: what two halves of the shards keep, and how much of it they have in common."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hfprune_dist.core.criteria import Criterion
from hfprune_dist.core.split_half import SHARES_KEPT, split_half_overlap
from hfprune_dist.core.unit_sums import sum_over_channels
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.kind_totals import Layout, Saved, Shape

CURVE = "curve"


def next_point(shards: int) -> int:
    """After how many shards halves are compared next, when so many are done: a power of two, from 2 on."""
    return max(2, 1 << shards.bit_length())


class Halves:
    """Sums over every other shard, of one kind of units, compared with those over the others on the way.

    Attributes:
        curve: (shards, criterion, share kept) -> overlap of the two halves (see ``core.split_half``).
    """

    ODD = "odd"

    def __init__(self, criteria: Sequence[Criterion], shape: Shape) -> None:
        self.curve: dict[tuple[int, str, float], float] = {}
        self._criteria = criteria
        self._shape = shape
        self._odd_KLU = torch.zeros(len(criteria), shape.layers, shape.units, dtype=torch.float64)

    def add(self, number: int, exact: Mapping[str, Tensor]) -> None:
        """Add the shard of this number, if it is of the half that is added up; the other one is the rest."""
        if number % 2:
            for odd_LU, criterion in zip(self._odd_KLU, self._criteria, strict=True):
                if criterion.has_halves:
                    odd_LU += self._of_units(criterion, exact)

    def compare(self, shards: int, exact: Mapping[str, Tensor]) -> None:
        """Add a point to the curve after 2, 4, 8, ... shards; ``exact`` are the sums over all of them."""
        if shards != next_point(shards - 1):
            return
        for criterion, odd_LU in zip(self._criteria, self._odd_KLU, strict=True):
            if criterion.has_halves:
                even_LU = self._of_units(criterion, exact) - odd_LU
                halves = self._layers(even_LU), self._layers(odd_LU)
                for share in SHARES_KEPT:
                    self.curve[shards, criterion.name, share] = split_half_overlap(*halves, share)

    def agree(self, shards: int, share: float) -> bool:
        """Whether a point was added after so many shards, where the halves have this share in common throughout."""
        newest = [value for (after, *_), value in self.curve.items() if after == shards]
        return bool(newest) and min(newest) >= share

    def saved(self) -> Saved:
        places = [criterion.name for criterion in self._criteria]
        points = [[shards, places.index(name), share, value] for (shards, name, share), value in self.curve.items()]
        return {self.ODD: self._odd_KLU, CURVE: torch.tensor(points, dtype=torch.float64)}

    def layout(self) -> Layout:
        """Of what ``saved`` tells, but for the curve, which grows."""
        return {self.ODD: (torch.float64, tuple(self._odd_KLU.shape))}

    def is_curve(self, points_P4: Tensor) -> bool:
        """Whether these can be a saved curve: number of shards, place of the criterion, share kept, overlap."""
        if not len(points_P4):
            return True
        is_table = points_P4.dim() == 2 and points_P4.shape[1] == 4
        return is_table and bool((points_P4[:, 1] < len(self._criteria)).all())

    def resume(self, saved: Saved, world: World) -> None:
        """Go on from what ``saved`` told; rank 0 has it."""
        if saved:
            points = saved[CURVE].tolist()
            self.curve = {(int(it[0]), self._criteria[int(it[1])].name, it[2]): it[3] for it in points}
            self._odd_KLU.copy_(saved[self.ODD])
        self.curve = world.broadcast(self.curve)
        world.broadcast_tensor(self._odd_KLU, 0)

    def _of_units(self, criterion: Criterion, exact: Mapping[str, Tensor]) -> Tensor:
        channels = self._shape.channels_per_unit if criterion.is_of_channels else 1
        return sum_over_channels(exact[criterion.name], channels)

    def _layers(self, sums_LU: Tensor) -> list[Tensor]:
        """Of each layer that has units, without what is behind them."""
        return [sums_U[:count] for sums_U, count in zip(sums_LU, self._shape.counts, strict=True) if count]
