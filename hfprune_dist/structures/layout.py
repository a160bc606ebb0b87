"""Named axes: which sizes of a model each dimension of its tensors follows.

An axis is a size that can shrink: ``hidden`` and ``vocabulary``, ``layers``, and within layer 3 ``layers.3.neurons``,
``layers.3.kv_groups``, ``layers.3.experts``. One whose name continues another's has its indices inside each of the
other's: ``layers.3.experts.neurons`` counts the neurons of all experts, one expert after another.

What stays of a model is a mapping of axes to ascending indices. From it follow the cut of every tensor, an index_select
along each dimension, and the number of parameters, a sum of products of sizes: exact whatever goes together.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, LAYERS, NEURONS

if TYPE_CHECKING:
    from hfprune_dist.structures.units import Units

# Axes that are no layer's, like that of the layers themselves.
VOCABULARY, HIDDEN = "vocabulary", "hidden"
# Kinds of units whose axis has another name than they.
INSIDE = {EXPERT_NEURONS: f"{EXPERTS}.{NEURONS}"}


class Dimension(NamedTuple):
    """A dimension of a tensor, which follows an axis.

    Attributes:
        axis: its name; of an axis within a layer, that within it.
        entries: number of consecutive entries of each index.
        stretches: number of such stretches, one after another, each with entries of every index: two where an
            architecture has gate and up in one tensor.
    """

    axis: str
    entries: int = 1
    stretches: int = 1

    def in_layer(self, number: int) -> Dimension:
        """Return the same dimension with the whole name of its axis."""
        return self if self.axis in (HIDDEN, VOCABULARY) else self._replace(axis=axis_of(number, self.axis))


# None: a dimension that no axis changes, like those after the last one that is given.
Dimensions = tuple[Dimension | None, ...]
# Names of tensors -> their dimensions. In names within a layer, {} stands for the number of each expert.
Tensors = Mapping[str, Dimensions]
OF_HIDDEN, OF_VOCABULARY = Dimension(HIDDEN), Dimension(VOCABULARY)


class Placed(NamedTuple):
    """A tensor of a model.

    Attributes:
        pattern: its name, with {} in place of the numbers of ``within``.
        within: the axes that the name runs over, each with the tensor's index: its layer, and its expert.
        dimensions: with whole names of axes.
    """

    pattern: str
    within: tuple[tuple[str, int], ...] = ()
    dimensions: Dimensions = ()


@dataclass(frozen=True)
class Layout:
    """The tensors of a model along its axes.

    Attributes:
        sizes: axis -> its size in the model as it is.
        tensors: all of the model, by name.
    """

    sizes: Mapping[str, int]
    tensors: Mapping[str, Placed]

    @classmethod
    def of_model(
        cls,
        names: Iterable[str],
        layers: str,
        units: Sequence[Units],
        inside: Tensors,
        outside: Tensors,
        sizes: Mapping[str, int],
    ) -> Layout:
        """Return the layout of a model.

        Args:
            names: of all its tensors; others that are mentioned, such as biases, aren't there.
            layers: the beginning of the names of all layers' tensors, before the layer's number.
            units: all kinds; each has its axis in every layer.
            inside, outside: other tensors, in every layer and outside layers.
            sizes: of the axes that are no layer's.
        """
        sizes, known = dict(sizes), {name: Placed(name, (), dimensions) for name, dimensions in outside.items()}
        for number in range(sizes[LAYERS]):
            there = [kind for kind in units if kind.counts[number]]
            sizes |= {axis_of(number, kind.kind): kind.counts[number] for kind in there}
            for experts, owned in [(1, inside), *((kind.experts, kind.tensors) for kind in there)]:
                for pattern, of_layer in owned.items():
                    dimensions = tuple(each and each.in_layer(number) for each in of_layer)
                    for expert in range(experts if "{}" in pattern else 1):
                        within = ((LAYERS, number), (axis_of(number, EXPERTS), expert))[: 1 + pattern.count("{}")]
                        name = f"{layers}.{number}.{pattern}".format(expert)
                        known[name] = Placed(f"{layers}.{{}}.{pattern}", within, dimensions)
        tensors = {}
        for name in names:
            own, _, part = name.removeprefix(f"{layers}.").partition(".")
            is_in_layer = name.startswith(f"{layers}.")
            other = Placed(f"{layers}.{{}}.{part}", ((LAYERS, int(own)),)) if is_in_layer else Placed(name)
            tensors[name] = known.get(name, other)
        return cls(sizes, tensors)

    def outer(self, axis: str) -> str | None:
        """Return the axis in each of whose indices an axis has indices of its own, if there is one in its layer."""
        outer = axis.rpartition(".")[0]
        return outer if outer in self.sizes else None

    def width(self, axis: str) -> int:
        """Return the number of an axis's indices in one tensor: of one inside another, those in each of its indices."""
        outer = self.outer(axis)
        return self.sizes[axis] // (self.sizes[outer] if outer else 1)

    def shape(self, name: str, found: Sequence[int]) -> list[int]:
        """Return the shape that a tensor has by the sizes of its axes; in dimensions without an axis, that found."""
        given = self.tensors[name].dimensions
        sizes = list(found)
        for place, each in enumerate(given):
            if each is not None:
                sizes[place : place + 1] = [self.width(each.axis) * each.entries * each.stretches]
        return sizes


def axis_of(layer: int, kind: str) -> str:
    """Return the name of the axis that counts a layer's units of a kind."""
    return f"{LAYERS}.{layer}.{INSIDE.get(kind, kind)}"


def kind_of_axis(axis: str) -> tuple[int, str]:
    """Return the layer of an axis, and the kind of the units that it counts: the inverse of ``axis_of``."""
    _, layer, name = axis.split(".", maxsplit=2)
    return int(layer), next((kind for kind, inside in INSIDE.items() if inside == name), name)
