"""Parameter counts of a model and of the structures that can be pruned, from which budgets are computed."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class ParameterCounts:
    """Numbers of parameters in a model and in its parts.

    Attributes:
        total: parameters of the whole model; a head tied to the embedding counts once.
        layers: parameters of each layer, including norms and biases.
        units: kind -> parameters of one unit, the same in every layer.
        shapes: shapes of the model's tensors, by name.
    """

    total: int
    layers: tuple[int, ...]
    units: Mapping[str, int]
    structures: Mapping[str, Units]
    shapes: Mapping[str, Sequence[int]]

    def of(self, shape: Shape) -> int:
        """Return the number of parameters of the model once it is pruned to a shape."""
        gone = self._factored(shape) + sum(self.layers) - sum(self.layers[layer] for layer in shape.layers)
        for kind, units in self.structures.items():
            before = sum(units.counts[layer] for layer in shape.layers)
            gone += self.units[kind] * (before - sum(shape.counts(units)))
        return self.total - gone

    def ratio(self, shape: Shape) -> float:
        """Return the share of the model's parameters that pruning to a shape removes."""
        return (self.total - self.of(shape)) / self.total

    def _factored(self, shape: Shape) -> int:
        """Parameters saved where matrices are replaced by low-rank factors."""
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
    """Count the parameters of a checkpoint.

    Args:
        shapes: name -> shape of the tensors that the model computes with.
        structures: kind -> units, for every kind that the model has.
        tied: name of a tensor that shares its values with another one and so doesn't count.
    """
    sizes = {name: math.prod(shape) for name, shape in shapes.items() if name != tied}
    units = next(iter(structures.values()))
    of_layers = [0] * units.num_layers
    for name, size in sizes.items():
        if name.startswith(f"{units.layers}."):
            of_layers[int(name.removeprefix(f"{units.layers}.").partition(".")[0])] += size
    per_unit = {kind: it.parameters_per_unit(shapes) for kind, it in structures.items()}
    return ParameterCounts(sum(sizes.values()), tuple(of_layers), per_unit, structures, shapes)
