"""The layers of a model that stay when it is pruned, and the units of each kind that stay within them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class Shape:
    """How many layers and units of a model stay.

    Attributes:
        layers: numbers of the layers that stay, ascending.
        units: kind -> number of units that each of these layers keeps, aligned with ``layers``. Kinds that are
            missing here keep all units.
        ranks: name within a layer of a low-rank projection (``low_rank``) -> its rank in each of these layers.
    """

    layers: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def counts(self, units: Units) -> tuple[int, ...]:
        """Return the number of units of one kind that each staying layer keeps.

        Args:
            units: the units of this kind in the unpruned model.
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
    """The layers and units of a model that stay, by their indices.

    Attributes:
        layers: numbers of the layers that stay, ascending.
        units: kind -> ascending int64 indices of the units that each of these layers keeps, aligned with ``layers``.
            Kinds that are missing here keep all units.
        ranks: as in ``Shape``.
    """

    layers: tuple[int, ...]
    units: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of_all_layers(cls, units: Mapping[str, Sequence[Tensor]]) -> Kept:
        """Return what stays of a model that keeps all its layers.

        Args:
            units: kind -> indices of the units that each layer keeps; at least one kind.
        """
        return cls(tuple(range(len(next(iter(units.values()))))), units)

    @property
    def shape(self) -> Shape:
        """The number of layers and units that stay."""
        units = {kind: tuple(len(row) for row in rows) for kind, rows in self.units.items()}
        return Shape(self.layers, units, self.ranks)

    def of_layer(self, layer: int, kind: str) -> Tensor:
        """Return the units that a staying layer keeps, for a kind that ``units`` contains."""
        return self.units[kind][self.layers.index(layer)]
