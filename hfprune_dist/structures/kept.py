"""What stays of a model once it is pruned: which layers, and which units of each kind within them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class Shape:
    """How much of a model stays.

    Attributes:
        layers: numbers of the layers that stay, ascending.
        units: kind -> how many units each of these layers keeps, aligned with ``layers``. A kind that isn't named
            stays whole.
        ranks: name within a layer of a projection of low rank (``low_rank``) -> its rank in each of these layers.
    """

    layers: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def counts(self, units: Units) -> tuple[int, ...]:
        """Units of a kind that each staying layer keeps.

        Args:
            units: those of the model.
        """
        assert self.layers and list(self.layers) == sorted(set(self.layers)), f"layers {self.layers}"
        there = tuple(units.counts[layer] for layer in self.layers)
        counts = tuple(self.units.get(units.kind, there))
        assert len(counts) == len(there), f"{len(counts)} numbers of {units.kind} for {len(there)} layers"
        for layer, count, most in zip(self.layers, counts, there, strict=True):
            assert min(1, most) <= count <= most, f"layer {layer} can't keep {count} of its {most} {units.kind}"
        return counts


@dataclass(frozen=True)
class Kept:
    """What stays of a model, by number.

    Attributes:
        layers: numbers of the layers that stay, ascending.
        units: kind -> what each of these layers keeps, aligned with ``layers``: ascending int64 indices of units. A
            kind that isn't named stays whole.
        ranks: as in ``Shape``.
    """

    layers: tuple[int, ...]
    units: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of_all_layers(cls, units: Mapping[str, Sequence[Tensor]]) -> Kept:
        """What stays where no layer goes.

        Args:
            units: kind -> what each layer keeps; one kind at least.
        """
        return cls(tuple(range(len(next(iter(units.values()))))), units)

    @property
    def shape(self) -> Shape:
        """How much it is."""
        units = {kind: tuple(len(row) for row in rows) for kind, rows in self.units.items()}
        return Shape(self.layers, units, self.ranks)

    def of_layer(self, layer: int, kind: str) -> Tensor:
        """The units that a staying layer keeps of a kind that is named."""
        return self.units[kind][self.layers.index(layer)]

    def numbered_by(self, earlier: Kept) -> Kept:
        """The same, as the model before an earlier pruning numbers it.

        Args:
            earlier: what that pruning kept.
        """
        kinds = [*earlier.units, *(kind for kind in self.units if kind not in earlier.units)]
        layers = tuple(earlier.layers[layer] for layer in self.layers)
        return Kept(layers, {kind: self._numbered(kind, earlier) for kind in kinds}, self.ranks)

    def _numbered(self, kind: str, earlier: Kept) -> list[Tensor]:
        if kind not in earlier.units:
            return list(self.units[kind])
        before = [earlier.units[kind][layer] for layer in self.layers]
        if kind not in self.units:
            return before
        return [numbers[row] for numbers, row in zip(before, self.units[kind], strict=True)]
