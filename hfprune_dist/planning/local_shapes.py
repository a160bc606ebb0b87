"""Local shapes: every layer that isn't protected loses the same share of its units of each kind.

The ratio alone decides the shape; scores decide within each layer. There are few KV groups, so they are rounded first,
and neurons make up the rest of the ratio.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.pruned_config import plain_group_counts
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.kinds.training import LoraPruneParameters
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.widths import OutOfReachError, closest_multiple
from hfprune_dist.structures import KV_GROUPS, NEURONS
from hfprune_dist.structures.kept import Shape


@dataclass(frozen=True)
class LocalTarget:
    """The shape wanted where all layers but the first and the last few lose the same share.

    Attributes:
        asked: the ratio, and what may be removed for it.
        protect_first, protect_last: how many of the first and last layers lose nothing.
    """

    asked: ShapeTarget
    protect_first: int
    protect_last: int

    @classmethod
    def of(cls, checkpoint: Checkpoint, params: PruneParameters | LoraPruneParameters, where: str) -> LocalTarget:
        """The target of a stage that prunes with ``allocation: local``; ``checkpoint`` is the dense model."""
        return cls(ShapeTarget.of(checkpoint, params, where), *params.protected())

    def shape(self) -> Shape:
        """The shape whose parameters come as close to the ratio as rounding allows.

        Of the numbers of KV groups for which neurons can make up the rest, layers keep the one closest to the share.
        Without protected layers, layers that were alike stay alike, and the checkpoint is a plain one.

        Raises:
            UserError: if no shape reaches the ratio, rounding leaves nothing to remove, or ``tensor_parallel``
                divides no number of KV groups.
        """
        asked, rows = self.asked, self._group_rows()
        largest = self._largest(rows)
        if asked.ratio > largest:
            raise self._out_of_reach(largest)
        shape = self._shape(min(rows, key=self._misses))
        if asked.counts.of(shape) == asked.counts.total:
            raise asked.removes_nothing()
        return shape

    def largest(self) -> float:
        """The ratio at which everything that may be removed is gone, whatever ratio is asked for."""
        return self._largest(self._group_rows())

    @property
    def _pruned(self) -> Sequence[int]:
        """Indices of the layers that lose something."""
        num_layers = self.asked.checkpoint.num_layers
        return range(self.protect_first, max(self.protect_first, num_layers - self.protect_last))

    @property
    def _wanted(self) -> float:
        """Parameters to remove."""
        return self.asked.ratio * self.asked.counts.total

    def _group_rows(self) -> list[tuple[int, ...]]:
        """Possible rows of KV group counts, one count per pruned layer, descending; every count is divisible by
        ``tensor_parallel``.
        """
        asked, split = self.asked, self.asked.tensor_parallel
        groups = [asked.groups.counts[layer] for layer in self._pruned]
        if KV_GROUPS not in asked.structures:
            return [tuple(groups)]
        if asked.groups.is_uniform and len(groups) == asked.checkpoint.num_layers:
            plain = plain_group_counts(asked.checkpoint)[::-1]
            divisible = [count for count in plain if count % split == 0]
            if not divisible:
                raise asked.unusable_split(plain[0])
            return [(count,) * len(groups) for count in divisible]
        if asked.divisor % split:
            raise asked.unusable_split(asked.divisor)
        most = asked.groups.most
        shares = [kept / most for kept in range(most, 0, -split)]
        rows = [tuple(max(split, round(share * it / split) * split) for it in groups) for share in shares]
        return list(dict.fromkeys(rows))

    def _misses(self, groups: Sequence[int]) -> tuple[float, float]:
        """How far a row of groups is from what is wanted: parameters that neurons can't make up, or that groups remove
        in excess; and the distance from the share of groups that should stay.
        """
        counts, left = self.asked.counts, self._left(groups)
        most = counts.units[NEURONS] * sum(count - self._narrowest(count) for count in self._widths)
        all_groups = sum(self.asked.groups.counts[layer] for layer in self._pruned)
        removable = counts.units[NEURONS] * sum(self._widths) + counts.units[KV_GROUPS] * all_groups
        return max(-left, left - most, 0.0), abs(sum(groups) / all_groups - (1 - self._wanted / removable))

    def _left(self, groups: Sequence[int]) -> float:
        """Parameters that neurons have to make up."""
        gone = sum(self.asked.groups.counts[layer] for layer in self._pruned) - sum(groups)
        return self._wanted - gone * self.asked.counts.units[KV_GROUPS]

    @property
    def _widths(self) -> list[int]:
        """Numbers of neurons of the pruned layers."""
        return [self.asked.neurons.counts[layer] for layer in self._pruned]

    def _narrowest(self, width: int) -> int:
        return min(self.asked.multiple_of, width)

    def _shape(self, groups: Sequence[int]) -> Shape:
        share = self._left(groups) / (self.asked.counts.units[NEURONS] * sum(self._widths))
        left = 1 - min(max(share, 0.0), 1.0)
        widths = [closest_multiple(left * width, width, self.asked.multiple_of) for width in self._widths]
        return self._whole_but(widths, groups)

    def _largest(self, rows: Sequence[Sequence[int]]) -> float:
        if not self._pruned:
            return 0.0
        narrowest = [self._narrowest(width) for width in self._widths]
        return self.asked.counts.ratio(self._whole_but(narrowest, rows[-1]))

    def _whole_but(self, widths: Sequence[int], groups: Sequence[int]) -> Shape:
        """The shape in which the pruned layers have these numbers of units, and the other layers all of theirs."""
        asked, layers = self.asked, range(self.asked.checkpoint.num_layers)
        units = {}
        for of_kind, counts in ((asked.neurons, widths), (asked.groups, groups)):
            pruned = dict(zip(self._pruned, counts, strict=True))
            units[of_kind.kind] = tuple(pruned.get(layer, of_kind.counts[layer]) for layer in layers)
        return Shape(tuple(layers), units)

    def _out_of_reach(self, largest: float) -> OutOfReachError:
        protects = self.protect_first + self.protect_last > 0
        limits = " with the layers that prune.protect_first and protect_last set aside" if protects else ""
        return self.asked.out_of_reach(largest, limits, lambda it: replace(self, asked=it).largest())
