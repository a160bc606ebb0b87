"""Comparison of the units that two halves of the shards keep, which shows whether the kept set has settled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hfprune_dist.core.criteria import Criterion
from hfprune_dist.core.split_half import SHARES_KEPT, split_half_overlap
from hfprune_dist.core.unit_sums import sum_over_channels
from hfprune_dist.distributed.world import World
from hfprune_dist.scoring.kind_totals import KindSizes, Layout, Saved

CURVE = "curve"


def next_point(shards: int) -> int:
    """Return the number of shards after which halves are compared next: a power of two, at least 2."""
    return max(2, 1 << shards.bit_length())


class Halves:
    """Sums over every second shard for one kind of units, compared with those over the other shards during the pass.

    Attributes:
        curve: (shards, criterion, share kept) -> overlap of the two halves (see ``core.split_half``).
    """

    ODD = "odd"

    def __init__(self, criteria: Sequence[Criterion], sizes: KindSizes) -> None:
        self.curve: dict[tuple[int, str, float], float] = {}
        self._criteria = criteria
        self._sizes = sizes
        self._odd_KLU = torch.zeros(len(criteria), sizes.layers, sizes.units, dtype=torch.float64)

    def add(self, number: int, exact: Mapping[str, Tensor]) -> None:
        """Add a shard if its number belongs to the half that is summed; the other half is the total minus this one."""
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
        """Return whether the halves were compared after ``shards`` shards and every overlap was at least ``share``."""
        newest = [value for (after, *_), value in self.curve.items() if after == shards]
        return bool(newest) and min(newest) >= share

    def saved(self) -> Saved:
        places = [criterion.name for criterion in self._criteria]
        points = [[shards, places.index(name), share, value] for (shards, name, share), value in self.curve.items()]
        return {self.ODD: self._odd_KLU, CURVE: torch.tensor(points, dtype=torch.float64)}

    def layout(self) -> Layout:
        """Return the layout of what ``saved`` returns, without the curve, which grows."""
        return {self.ODD: (torch.float64, tuple(self._odd_KLU.shape))}

    def is_curve(self, points_P4: Tensor) -> bool:
        """Return whether these may be a saved curve: (number of shards, index of criterion, share kept, overlap)."""
        if not points_P4.numel():
            return True
        is_table = points_P4.dim() == 2 and points_P4.shape[1] == 4
        return is_table and bool(torch.isin(points_P4[:, 1], torch.arange(len(self._criteria)).to(points_P4)).all())

    def resume(self, saved: Saved, world: World) -> None:
        """Restore what ``saved`` returned; only rank 0 has it."""
        if saved:
            points = saved[CURVE].tolist()
            self.curve = {(int(it[0]), self._criteria[int(it[1])].name, it[2]): it[3] for it in points}
            self._odd_KLU.copy_(saved[self.ODD])
        self.curve = world.broadcast(self.curve)
        world.broadcast_tensor(self._odd_KLU, 0)

    def _of_units(self, criterion: Criterion, exact: Mapping[str, Tensor]) -> Tensor:
        channels = self._sizes.channels_per_unit if criterion.is_of_channels else 1
        return sum_over_channels(exact[criterion.name], channels)

    def _layers(self, sums_LU: Tensor) -> list[Tensor]:
        """Return the sums of each layer that has units, without padding."""
        return [sums_U[:count] for sums_U, count in zip(sums_LU, self._sizes.counts, strict=True) if count]
