"""Plain shapes: a number of layers, and numbers of KV groups and neurons that are the same in all layers.

Many plain shapes have the same number of parameters. Measurements decide which of them is closest to the dense model,
so there must be few.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.pruned_config import plain_group_counts
from hfprune_dist.errors import UserError
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.structures import KV_GROUPS, NEURONS
from hfprune_dist.structures.kept import Shape

# The most shapes that are measured for a ratio, and the most different numbers of KV groups among them.
MOST_SHAPES, MOST_GROUP_COUNTS = 24, 4
# Numbers of layers are tried in steps of one layer for every LAYERS_OF_A_STEP layers of the model.
LAYERS_OF_A_STEP = 15
_NAME = re.compile(r"(\d+) layers, (\d+) KV groups, width (\d+)")

T = TypeVar("T")


@dataclass(frozen=True, order=True)
class PlainShape:
    """How much each layer keeps, and how many layers stay."""

    num_layers: int
    kv_groups: int
    width: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> PlainShape:
        """The current shape of a model whose layers are alike."""
        structures = checkpoint.structures
        return cls(checkpoint.num_layers, structures[KV_GROUPS].most, structures[NEURONS].most)

    @property
    def name(self) -> str:
        """Its name in metrics."""
        return f"{self.num_layers} layers, {self.kv_groups} KV groups, width {self.width}"

    @classmethod
    def named(cls, name: str) -> PlainShape:
        """The shape with a ``name``.

        Raises:
            ValueError: if it isn't the name of one.
        """
        found = _NAME.fullmatch(name)
        if found is None:
            raise ValueError(f"{name!r} names no shape")
        return cls(*map(int, found.groups()))


def step_of_layers(num_layers: int) -> int:
    """By how much the numbers of layers that are tried differ, for a model with ``num_layers``."""
    return max(1, round(num_layers / LAYERS_OF_A_STEP))


def plain_shapes(target: ShapeTarget) -> list[PlainShape]:
    """The shapes to choose from, at most ``MOST_SHAPES``, sorted by numbers of layers, then groups, descending.

    The first is the one that only loses neurons, if those are enough. With ``multiple_of`` 1, parameters come as close
    to the ratio as possible; with larger multiples, widths are rounded down, so that at least the ratio is removed.

    Raises:
        UserError: if no shape reaches the ratio whichever layers go; or ``tensor_parallel`` divides no number of
            groups.
    """
    found = all_plain_shapes(target)
    if not found or target.ratio > _largest(target):
        raise _none_reaches(target)
    return _spread(found, MOST_SHAPES)


def all_plain_shapes(target: ShapeTarget) -> list[PlainShape]:
    """All such shapes, however many there are; none if none reaches the ratio or layers differ already.

    Raises:
        UserError: if ``tensor_parallel`` divides no number of groups.
    """
    if not target.checkpoint.is_uniform:
        return []
    shapes = [_with_width(target, *cell) for cell in _cells(target)]
    return [shape for shape in shapes if shape is not None]


def fitted_to_layers(target: ShapeTarget, plain: PlainShape, layers: Sequence[int]) -> PlainShape | None:
    """A shape with the width that the ratio asks for if these layers stay, whose parameters may differ; None if no
    width reaches it.

    Args:
        layers: indices of as many layers of the dense model as the shape has.
    """
    if ratio_of(target, plain, layers) == ratio_of(target, plain):
        return plain  # as planned
    return _with_width(target, plain.num_layers, plain.kv_groups, layers)


def shape_of(target: ShapeTarget, plain: PlainShape, layers: Sequence[int] | None = None) -> Shape:
    """A plain shape of a model.

    Args:
        layers: indices of the layers that stay; None: the first ones, for counting if all are alike.
    """
    kept = tuple(range(plain.num_layers) if layers is None else layers)
    assert len(kept) == plain.num_layers, f"{len(kept)} layers for {plain}"
    each = {NEURONS: plain.width, KV_GROUPS: plain.kv_groups}
    return Shape(kept, {kind: (count,) * len(kept) for kind, count in each.items()})


def ratio_of(target: ShapeTarget, plain: PlainShape, layers: Sequence[int] | None = None) -> float:
    """The share of the dense model's parameters that a plain shape lacks; layers are those of ``shape_of``."""
    return target.counts.ratio(shape_of(target, plain, layers))


def possible_outcomes(target: ShapeTarget, plain: PlainShape) -> list[Shape]:
    """What a planned shape may become, once it is known which layers go: kinds of attention may differ in parameters,
    and the width makes up for that.
    """
    outcomes: list[Shape] = []
    for layers in _layers_that_may_stay(target, plain.num_layers):
        fitted = fitted_to_layers(target, plain, layers)
        outcomes += [] if fitted is None else [shape_of(target, fitted, layers)]
    return outcomes or [shape_of(target, plain)]


def _layers_that_may_stay(target: ShapeTarget, count: int) -> Iterator[list[int]]:
    """Indices of ``count`` layers, once for each number of layers of each size that may go."""
    every, sizes = range(target.checkpoint.num_layers), target.counts.layers
    of_size: dict[int, list[int]] = {}
    for layer in every:
        if layer not in target.undroppable:
            of_size.setdefault(sizes[layer], []).append(layer)
    for numbers in itertools.product(*(range(len(them) + 1) for them in of_size.values())):
        if sum(numbers) == len(every) - count:
            gone = {it for number, them in zip(numbers, of_size.values(), strict=True) for it in them[:number]}
            yield [layer for layer in every if layer not in gone]


def group_counts(target: ShapeTarget) -> list[int]:
    """Numbers of KV groups that all layers may have, descending: at least a quarter of the dense model's.

    Raises:
        UserError: if ``tensor_parallel`` divides none of them.
    """
    most = target.groups.most
    if KV_GROUPS not in target.structures:
        return [most]
    fitting = [count for count in plain_group_counts(target.checkpoint)[::-1] if 4 * count >= most]
    divisible = [count for count in fitting if count % target.tensor_parallel == 0]
    if not divisible:
        raise target.unusable_split(fitting[0])
    return divisible


def _cells(target: ShapeTarget) -> list[tuple[int, int]]:
    """Possible pairs (layers, KV groups)."""
    every = target.checkpoint.num_layers
    numbers = range(every, target.fewest_layers - 1, -step_of_layers(every))
    groups = _spread(group_counts(target), MOST_GROUP_COUNTS)
    return [(number, count) for number in numbers for count in groups]


def _with_width(
    target: ShapeTarget, num_layers: int, kv_groups: int, layers: Sequence[int] | None = None
) -> PlainShape | None:
    """The shape with the width that the ratio asks for; None if there is none, or if it removes nothing. Layers are
    those of ``shape_of``.
    """
    counts, most, multiple_of = target.counts, target.neurons.most, target.multiple_of
    whole, narrowest = (PlainShape(num_layers, kv_groups, width) for width in (most, multiple_of))
    if multiple_of > most or target.ratio > ratio_of(target, narrowest, layers):
        return None
    gone = counts.total - counts.of(shape_of(target, whole, layers))
    exact = most - (target.ratio * counts.total - gone) / (num_layers * counts.units[NEURONS])
    width = round(exact) if multiple_of == 1 else int(exact // multiple_of) * multiple_of
    shape = replace(whole, width=max(width, multiple_of))
    return None if shape.width > most or shape == PlainShape.of(target.checkpoint) else shape


def _none_reaches(target: ShapeTarget) -> UserError:
    largest = _largest(target)
    if target.ratio > largest:
        return target.out_of_reach(largest, "", _largest)
    cells = _cells(target)
    larger = min(it for it in (_smallest(target, *cell) for cell in cells) if it > target.ratio)
    return target.comes_to_none(larger)


def _largest(target: ShapeTarget) -> float:
    """The largest ratio that a shape reaches even if the layers that go are those with the fewest parameters."""
    if target.multiple_of > target.neurons.most:
        return 0.0
    narrowest = [PlainShape(*cell, target.multiple_of) for cell in _cells(target)]
    return max(ratio_of(target, it, _without_smallest(target, it.num_layers)) for it in narrowest)


def _without_smallest(target: ShapeTarget, num_layers: int) -> list[int]:
    """Indices of the layers that stay if those with the fewest parameters go."""
    every = range(target.checkpoint.num_layers)
    droppable = sorted({*every} - target.undroppable, key=target.counts.layers.__getitem__)
    return sorted({*every} - {*droppable[: len(every) - num_layers]})


def _smallest(target: ShapeTarget, num_layers: int, kv_groups: int) -> float:
    """The ratio of the widest shape that lacks something; 0 if there is none."""
    most, multiple_of = target.neurons.most, target.multiple_of
    widest = PlainShape(num_layers, kv_groups, most // multiple_of * multiple_of)
    if widest == PlainShape.of(target.checkpoint):
        widest = replace(widest, width=most - multiple_of)
    return ratio_of(target, widest) if widest.width else 0.0


def _spread(values: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the values, spread as evenly as possible, with the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[number * (len(values) - 1) // (most - 1)] for number in range(most)]
