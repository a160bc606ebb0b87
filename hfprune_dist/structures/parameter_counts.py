"""Parameters of a model and of what pruning can take from it: what budgets are computed from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters.

    Attributes:
        total: of the whole model; a head tied to the embedding counts once.
        layers: of each layer, norms and biases included.
        units: kind -> of one unit, the same in every layer.
        shapes: of the model's tensors.
    """

    total: int
    layers: tuple[int, ...]
    units: Mapping[str, int]
    structures: Mapping[str, Units]
    shapes: Mapping[str, Sequence[int]]

    def of(self, shape: Shape) -> int:
        """Of the model with such a shape."""
        outside, gone = self.total - sum(self.layers), sum(map(sum, self._gone(shape))) + self._factored(shape)
        return outside + sum(self.layers[layer] for layer in shape.layers) - gone

    def ratio(self, shape: Shape) -> float:
        """The share of the model's parameters that such a shape lacks."""
        return (self.total - self.of(shape)) / self.total

    def _gone(self, shape: Shape) -> list[list[int]]:
        """What each staying layer loses with its units, for each kind."""
        return [
            [
                self.units[kind] * (units.counts[layer] - count)
                for layer, count in zip(shape.layers, shape.counts(units), strict=True)
            ]
            for kind, units in self.structures.items()
        ]

    def _factored(self, shape: Shape) -> int:
        """What goes with matrices of which factors are left."""
        units = next(iter(self.structures.values()))
        gone = 0
        for projection, ranks in shape.ranks.items():
            for layer, rank in zip(shape.layers, ranks, strict=True):
                outputs, inputs = self.shapes[units.tensor(layer, f"{projection}.weight")]
                gone += outputs * inputs - rank * (outputs + inputs)
        return gone


def count_parameters(
    shapes: Mapping[str, Sequence[int]], structures: Mapping[str, Units], tied: str | None
) -> ParameterCounts:
    """Count what a checkpoint has.

    Args:
        shapes: of the tensors that the model computes with.
        structures: all kinds of units that it has.
        tied: name of a tensor that is another one as well.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if name != tied}
    units = next(iter(structures.values()))
    of_layers = [0] * units.num_layers
    for name, size in sizes.items():
        if name.startswith(f"{units.layers}."):
            of_layers[int(name.removeprefix(f"{units.layers}.").partition(".")[0])] += size
    per_unit = {kind: it.parameters_per_unit(shapes) for kind, it in structures.items()}
    return ParameterCounts(sum(sizes.values()), tuple(of_layers), per_unit, structures, shapes)
