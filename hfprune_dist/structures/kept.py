"""What stays of a model when it is pruned: layers, and the units of each kind within them; and how large that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class Shape:
    """Which layers of a model stay, how many units of each kind in each of them, and at which ranks; see ``Kept``."""

    layers: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    def counts(self, units: Units) -> tuple[int, ...]:
        """Return the number of units of one kind that each staying layer keeps, given those of the unpruned model."""
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
        ranks: name within a layer of a low-rank projection (``low_rank``) -> its rank in each of these layers.
    """

    layers: tuple[int, ...]
    units: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @classmethod
    def of_all_layers(cls, units: Mapping[str, Sequence[Tensor]]) -> Kept:
        """Return what stays of a model that keeps all its layers, and of at least one kind these units."""
        return cls(tuple(range(len(next(iter(units.values()))))), units)

    @property
    def shape(self) -> Shape:
        """The layers that stay, with the number of units in each instead of their indices."""
        units = {kind: tuple(len(row) for row in rows) for kind, rows in self.units.items()}
        return Shape(self.layers, units, self.ranks)

    def of_layer(self, layer: int, kind: str) -> Tensor:
        """Return the units that a staying layer keeps, for a kind that ``units`` contains."""
        return self.units[kind][self.layers.index(layer)]


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters in a model and in its parts.

    Attributes:
        total: of the whole model; a head tied to the embedding counts once.
        layers: of each layer, including norms and biases.
        units: kind -> of one unit, the same in every layer.
        structures, shapes: as in ``count_parameters``.
    """

    total: int
    layers: tuple[int, ...]
    units: Mapping[str, int]
    structures: Mapping[str, Units]
    shapes: Mapping[str, Sequence[int]]

    def after(self, shape: Shape) -> int:
        """Return the number of parameters of the model once it is pruned to a shape."""
        gone = sum(self.layers) - sum(self.layers[layer] for layer in shape.layers)
        for kind, units in self.structures.items():
            before = sum(units.counts[layer] for layer in shape.layers)
            gone += self.units[kind] * (before - sum(shape.counts(units)))
        any_units = next(iter(self.structures.values()))
        for projection, ranks in shape.ranks.items():  # matrices replaced by low-rank factors
            for layer, rank in zip(shape.layers, ranks, strict=True):
                outputs, inputs = self.shapes[any_units.tensor(layer, f"{projection}.weight")]
                gone += outputs * inputs - rank * (outputs + inputs)
        return self.total - gone

    def ratio(self, shape: Shape) -> float:
        """Return the share of the model's parameters that pruning to a shape removes."""
        return (self.total - self.after(shape)) / self.total


def count_parameters(
    shapes: Mapping[str, Sequence[int]], structures: Mapping[str, Units], tied: str | None
) -> ParameterCounts:
    """Count the parameters of a checkpoint, given the shapes of the tensors that the model computes with, and its units
    by kind; the tensor that is ``tied``, if any, shares its values with another one and doesn't count.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if name != tied}
    units = next(iter(structures.values()))
    of_layers = [0] * units.num_layers
    for name, size in sizes.items():
        if name.startswith(f"{units.layers}."):
            of_layers[int(name.removeprefix(f"{units.layers}.").partition(".")[0])] += size
    per_unit = {}
    for kind, units_of_kind in structures.items():
        layer = next(layer for layer, count in enumerate(units_of_kind.counts) if count)
        owned = sum(math.prod(shapes[name]) for name, _ in units_of_kind.in_layer(layer, shapes))
        per_unit[kind] = owned // units_of_kind.counts[layer]
    return ParameterCounts(sum(sizes.values()), tuple(of_layers), per_unit, structures, shapes)
