"""What stays of a model when it is pruned: layers, and the units of each kind within them; and how large that is."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hfprune_dist.structures import LAYERS
from hfprune_dist.structures.layout import Layout, Placed, axis_of

if TYPE_CHECKING:
    from torch import Tensor

    from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class Shape:
    """Which layers of a model stay, how many units of each kind in each of them, and at which ranks; see ``Kept``."""

    layers: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    whole: Mapping[str, int] = field(default_factory=dict)

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
        whole: other axes of the whole model (``layout``) -> ascending int64 indices; axes that are missing stay whole.
    """

    layers: tuple[int, ...]
    units: Mapping[str, Sequence[Tensor]] = field(default_factory=dict)
    ranks: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    whole: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of_all_layers(cls, units: Mapping[str, Sequence[Tensor]]) -> Kept:
        """Return what stays of a model that keeps all its layers, and of at least one kind these units."""
        return cls(tuple(range(len(next(iter(units.values()))))), units)

    @property
    def shape(self) -> Shape:
        """The layers that stay, with the number of units in each instead of their indices."""
        units = {kind: tuple(len(row) for row in rows) for kind, rows in self.units.items()}
        return Shape(self.layers, units, self.ranks, {axis: len(kept_K) for axis, kept_K in self.whole.items()})

    @property
    def axes(self) -> dict[str, Tensor]:
        """The axes of layers and of the whole model that shrink, except for that of the layers -> what stays."""
        of_layers = (
            (axis_of(layer, kind), kept_K)
            for kind, rows in self.units.items()
            for layer, kept_K in zip(self.layers, rows, strict=True)
            if len(kept_K)
        )
        return {**self.whole, **dict(of_layers)}

    def of_layer(self, layer: int, kind: str) -> Tensor:
        """Return the units that a staying layer keeps, for a kind that ``units`` contains."""
        return self.units[kind][self.layers.index(layer)]


class ParameterCounts:
    """Numbers of parameters in a model and in its parts.

    Args:
        layout: the model's.
        shapes: of the tensors that it computes with.
        structures: its units, by kind.
        tied: the tensor, if any, that shares its values with another one and doesn't count.

    Attributes:
        total: of the whole model; a head tied to the embedding counts once.
        layers: of each layer, including norms and biases.
        units: kind -> of one unit, the same in every layer.
    """

    def __init__(
        self,
        layout: Layout,
        shapes: Mapping[str, Sequence[int]],
        structures: Mapping[str, Units],
        tied: str | None = None,
    ) -> None:
        self._layout = layout
        self._shapes = shapes
        self._structures = structures
        # For each layer, and at the end for what is in none: axes -> factor of the product of their sizes.
        self._terms = [Counter[tuple[str, ...]]() for _ in range(layout.sizes[LAYERS] + 1)]
        for name, tensor in layout.tensors.items():
            if name != tied and all(index == 0 for _, index in tensor.within[1:]):  # the first of experts, for all
                layer = tensor.within[0][1] if tensor.within else -1
                axes, factor = _product(layout, tensor, shapes[name])
                self._terms[layer][axes] += factor
        self.layers = tuple(self._counted(terms, {}) for terms in self._terms[:-1])
        self.total = sum(self.layers) + self._counted(self._terms[-1], {})
        self.units = {kind: self._of_one(units) for kind, units in structures.items()}

    def after(self, shape: Shape) -> int:
        """Return the number of parameters of the model once it is pruned to a shape."""
        sizes = dict(shape.whole)
        for kind in shape.units:
            counts = shape.counts(self._structures[kind])
            sizes |= {axis_of(layer, kind): count for layer, count in zip(shape.layers, counts, strict=True)}
        left = sum(self._counted(self._terms[layer], sizes) for layer in (*shape.layers, -1))
        any_units = next(iter(self._structures.values()))
        for projection, ranks in shape.ranks.items():  # matrices replaced by low-rank factors
            for layer, rank in zip(shape.layers, ranks, strict=True):
                outputs, inputs = self._shapes[any_units.tensor(layer, f"{projection}.weight")]
                left += rank * (outputs + inputs) - outputs * inputs
        return left

    def ratio(self, shape: Shape) -> float:
        """Return the share of the model's parameters that pruning to a shape removes."""
        return (self.total - self.after(shape)) / self.total

    def _counted(self, terms: Mapping[tuple[str, ...], int], sizes: Mapping[str, int]) -> int:
        return sum(factor * math.prod(self._size(axis, sizes) for axis in axes) for axes, factor in terms.items())

    def _size(self, axis: str, sizes: Mapping[str, int]) -> int:
        outer = self._layout.outer(axis)
        if axis not in sizes and outer is not None and outer in sizes:
            return self._layout.width(axis) * sizes[outer]
        return sizes.get(axis, self._layout.sizes[axis])

    def _of_one(self, units: Units) -> int:
        layer = next(layer for layer, count in enumerate(units.counts) if count)
        fewer = self._counted(self._terms[layer], {axis_of(layer, units.kind): units.counts[layer] - 1})
        return self.layers[layer] - fewer


def _product(layout: Layout, tensor: Placed, shape: Sequence[int]) -> tuple[tuple[str, ...], int]:
    """The axes whose sizes multiply to a tensor's parameters, or to those of all experts' tensors; and the factor."""
    followed = [axis for axis, _ in tensor.within[1:]] + [each.axis for each in tensor.dimensions if each is not None]
    inside = {layout.outer(axis) for axis in followed}  # an axis inside another one counts the indices of both
    sizes = zip(shape, [*tensor.dimensions, *[None] * len(shape)], strict=False)
    factor = math.prod(size if each is None else each.entries * each.stretches for size, each in sizes)
    return tuple(sorted(axis for axis in followed if axis not in inside)), factor
