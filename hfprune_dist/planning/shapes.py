"""The shapes that a method may make of a model: those that come nearest to the ratio of its ``Target``.

A shape is what each layer keeps. Candidates lie on lines, along which one size grows; on each line, the shape whose
parameters come nearest to the ratio is taken. Where several lines have one, measurements decide, or for ``allocation:
local`` the share of KV groups. Where units of all layers compete by score, there are none: the target bounds them.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.planning.target import Target
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, KV_GROUPS, NEURONS
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.units import Units

# The most plain shapes that are measured for a ratio, and the most different numbers of KV groups among them.
MOST_SHAPES, MOST_GROUP_COUNTS = 24, 4
# Experts' matrices are multiplied in groups, for which torch requires rows of whole 16 bytes: 8 numbers of 2 bytes.
ALIGNED = 8
# LoRAP (arXiv 2404.09695): ratio of the parameters of v and o that stay to those of q and k.
SPLIT = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Line:
    """Shapes that differ in one size.

    Attributes:
        sizes: ascending; a larger size never has fewer parameters.
        slack: how many parameters a shape may remove more or less than was asked for.
        at_least: whether it must remove as many at least.
    """

    sizes: Sequence[int]
    shape: Callable[[int], Shape]
    slack: float
    at_least: bool = False


def nearest(target: Target, line: Line) -> tuple[Shape, bool] | None:
    """The shape of a line that comes nearest to the ratio, and whether that is near enough; None if none removes
    anything.
    """
    counts, wanted = target.counts, target.counts.total - target.removals

    def parameters(size: int) -> int:
        return counts.after(line.shape(size))

    sizes = line.sizes
    if sizes and parameters(sizes[-1]) == counts.total:  # the model as it is
        sizes = sizes[: bisect_left(sizes, counts.total, key=parameters)]
    if not sizes:
        return None
    above = bisect_right(sizes, wanted + 0.5, key=parameters)  # ratios are rounded to less than a parameter
    around = sizes[max(above - 1, 0) : above + (not line.at_least or not above)]
    shape = min(map(line.shape, around), key=lambda shape: abs(counts.after(shape) - wanted))
    beyond = wanted - counts.after(shape)
    return shape, (-0.5 if line.at_least else -line.slack) <= beyond <= line.slack


def shapes_for(target: Target) -> list[Shape]:
    """The shapes that compete for a ratio: a single one if the ratio decides; none if scores or a search do. A ratio
    that no shape comes to is refused.

    With ``allocation: plain``, which layers stay is measured, and the shapes have the first ones.
    """
    if target.competes:
        largest = target.counts.ratio(target.smallest()) if target.splits_groups else 0.0
        if target.ratio > largest:
            raise target.out_of_reach(largest)
        least = target.least_removals()
        if 2 * target.removals < least:
            raise target.out_of_reach(least / target.counts.total)
        return []
    found = [near for line in _lines(target) if (near := nearest(target, line)) is not None]
    fitting = [shape for shape, fits in found if fits]
    if not fitting:
        ratios = (target.counts.ratio(shape) for shape, _ in found)
        raise target.out_of_reach(min(ratios, key=lambda ratio: abs(ratio - target.ratio), default=0.0))
    return spread(fitting, MOST_SHAPES) if target.allocation == "plain" else fitting[:1]


def shape_for(target: Target) -> Shape:
    """The shape that a ratio decides."""
    (shape,) = shapes_for(target)
    return shape


def _lines(target: Target) -> list[Line]:
    """The lines of an allocation; except for plain shapes, the first that comes to the ratio is taken."""
    if target.dense.family.experts:
        return [_line_of_experts(target) if EXPERTS in target.structures else _line_of_expert_neurons(target)]
    if target.allocation == "plain":  # one for each number of layers, then of KV groups, descending
        numbers = range(target.dense.num_layers, target.fewest_layers - 1, -target.step_of_layers)
        groups = numbers_of_groups(target)
        return [_plain_line(target, range(number), count) for number in numbers for count in groups]
    if target.allocation == "low_rank":
        return [_low_rank_line(target)]
    return [_local_line(target, row) for row in _rows_of_groups(target)] if target.pruned_layers else []


def _parameters_of_a_step(target: Target, num_layers: int) -> int:
    return target.multiple_of * num_layers * target.counts.units[NEURONS]


def _nearest_multiple(exact: float, width: int, multiple_of: int) -> int:
    """The number of units nearest to ``exact`` that a layer may keep: all ``width`` of them, or fewer in a multiple."""
    multiple = max(multiple_of, round(exact / multiple_of) * multiple_of)
    return min((min(multiple, width), width), key=lambda kept: abs(kept - exact))


# One width, or the same share of each layer's units.


def _local_line(target: Target, groups: Sequence[int]) -> Line:
    """Shapes in which the layers that aren't protected have ``groups``, and lose the same share of their neurons."""
    layers, most, widths = range(target.dense.num_layers), target.neurons.most, target.neurons.counts
    of_layer = dict(zip(target.pruned_layers, groups, strict=True))
    all_groups = tuple(of_layer.get(layer, count) for layer, count in enumerate(target.groups.counts))

    def shape(size: int) -> Shape:
        narrowed = (_nearest_multiple(size * width / most, width, target.multiple_of) for width in widths)
        kept = tuple(less if layer in of_layer else widths[layer] for layer, less in enumerate(narrowed))
        return Shape(tuple(layers), {NEURONS: kept, KV_GROUPS: all_groups})

    return Line(range(1, most + 1), shape, _parameters_of_a_step(target, len(groups)) / 2)


def _rows_of_groups(target: Target) -> list[tuple[int, ...]]:
    """The numbers of KV groups that the layers that aren't protected may have; those come first whose share of all
    groups is nearest to the share of neurons and groups together that stays. Without protected layers, and if all
    layers are alike, the checkpoint stays plain.
    """
    counts, split = [target.groups.counts[layer] for layer in target.pruned_layers], target.tensor_parallel
    if KV_GROUPS not in target.structures:
        return [tuple(counts)]
    if target.groups.is_uniform and len(counts) == target.dense.num_layers:
        rows = [(count,) * len(counts) for count in target.plain_groups()]
    else:
        most = target.groups.most
        rows = [
            tuple(max(split, round(kept / most * count / split) * split) for count in counts)
            for kept in range(split, most + 1, split)
            if target.splits_groups
        ]
    neurons = sum(target.neurons.counts[layer] for layer in target.pruned_layers)
    units = target.counts.units
    share = 1 - target.removals / (units[NEURONS] * neurons + units[KV_GROUPS] * sum(counts))
    return sorted(dict.fromkeys(rows), key=lambda row: abs(sum(row) / sum(counts) - share))


# Plain shapes: a number of layers, and numbers of KV groups and neurons that are the same in all of them.


def numbers_of_groups(target: Target) -> list[int]:
    """The numbers of KV groups that plain shapes have, descending: at least a quarter of the dense model's."""
    most = target.groups.most
    if KV_GROUPS not in target.structures:
        return [most]
    return spread([count for count in target.plain_groups()[::-1] if 4 * count >= most], MOST_GROUP_COUNTS)


def _plain_line(target: Target, layers: Iterable[int], groups: int) -> Line:
    """Shapes with these layers. With a ``multiple_of`` above 1, at least the ratio is removed, else what is nearest."""
    kept, multiple_of = tuple(layers), target.multiple_of
    step = _parameters_of_a_step(target, len(kept))

    def shape(width: int) -> Shape:
        return Shape(kept, {NEURONS: (width,) * len(kept), KV_GROUPS: (groups,) * len(kept)})

    widths = range(multiple_of, target.neurons.most + 1, multiple_of)
    return Line(widths, shape, step / 2 if multiple_of == 1 else step - 1, at_least=multiple_of > 1)


def with_layers(target: Target, layers: Iterable[int], groups: int) -> Shape | None:
    """The plain shape with the layers that turn out to stay, at the ratio; None if no width comes to it."""
    shape, fits = nearest(target, _plain_line(target, layers, groups)) or (None, False)
    return shape if fits else None


def name_of_plain(shape: Shape) -> str:
    """The name of a plain shape in metrics."""
    return f"{len(shape.layers)} layers, {shape.units[KV_GROUPS][0]} KV groups, width {shape.units[NEURONS][0]}"


def spread(values: Sequence[T], most: int) -> list[T]:
    """At most ``most`` of the values, spread as evenly as possible, with the first and the last among them."""
    if len(values) <= most:
        return list(values)
    return [values[number * (len(values) - 1) // (most - 1)] for number in range(most)]


# Mixtures of experts: as many experts in each layer, or as wide ones, so that the result loads everywhere.


def _line_of_experts(target: Target) -> Line:
    """Shapes in which every layer with experts has as many of them."""
    experts, counts = target.dense.family.experts, target.dense.structures[EXPERTS].counts
    assert experts is not None
    step = math.lcm(target.multiple_of, experts.groups)
    fewest = -(-experts.fewest // step) * step

    def shape(number: int) -> Shape:
        return Shape(tuple(range(len(counts))), {EXPERTS: tuple(number if count else 0 for count in counts)})

    return Line(range(fewest, experts.count, step), shape, target.counts.total, at_least=True)


def _line_of_expert_neurons(target: Target) -> Line:
    """Shapes in which all experts have the same width, and other MLPs lose at least the same share of neurons. If KV
    groups may go, layers keep the share of them that is nearest.
    """
    dense, multiple_of = target.dense, target.multiple_of
    experts, kinds, layers = dense.structures[EXPERT_NEURONS], dense.pruned_kinds([NEURONS]), range(dense.num_layers)
    plain = target.plain_groups() if KV_GROUPS in target.structures else []

    def width_of(kind: Units, size: int) -> int:
        rounded = kind.width * size // experts.width // multiple_of * multiple_of
        return max(rounded, min(multiple_of, kind.width))

    def shape(size: int) -> Shape:
        widths: dict[str, int] = {}
        for kind in kinds:  # those that one field of config.json describes have one width
            widths.setdefault(next(iter(kind.fields)), size if kind is experts else width_of(kind, size))
        units = {}
        for kind in kinds:
            (name,) = {*kind.fields} & widths.keys()
            units[kind.kind] = tuple(widths[name] * kind.copies if count else 0 for count in kind.counts)
        if plain:
            groups = min(plain, key=lambda count: abs(count - size / experts.width * plain[-1]))
            units[KV_GROUPS] = (groups,) * len(layers)
        return Shape(tuple(layers), units)

    if KV_GROUPS in target.structures and not plain:
        return Line((), shape, 0.0)
    step = math.lcm(multiple_of, ALIGNED)
    sizes = list(range(step, experts.width, step)) or [experts.width]
    return Line(sizes, shape, target.counts.total, at_least=True)


# LoRAP: matrices of attention become products of two of low rank, and all MLPs get one width.


def _low_rank_line(target: Target) -> Line:
    """Attention and MLPs keep the same share of the decoder's matrices. Of attention's parameters that stay, ``SPLIT``
    parts go to v and o, and one part to q and k. Both matrices of such a pair keep the same share of their parameters,
    and ranks are rounded down. A pair whose part is at least its full size stays as it is and passes the rest on.
    Neurons make up for what rounding leaves of the ratio. For a model without grouped queries, these are the ranks of
    LoRAP's code, except for one or two where it rounds twice.
    """
    dense, layers, most = target.dense, range(target.dense.num_layers), target.neurons.most
    in_layers = (info.shape for name, info in dense.tensors.items() if name.startswith(f"{dense.family.layers}."))
    matrices = sum(math.prod(shape) for shape in in_layers if len(shape) == 2)
    left = max(0.0, 1 - target.removals / matrices)
    ranks = {name: (rank,) * len(layers) for name, rank in _ranks(dense, left).items()}

    def shape(size: int) -> Shape:
        width = _nearest_multiple(size, most, target.multiple_of)
        return Shape(tuple(layers), {NEURONS: (width,) * len(layers)}, ranks)

    return Line(range(1, most + 1), shape, _parameters_of_a_step(target, len(layers)) / 2)


def _ranks(dense: Checkpoint, share: float) -> Mapping[str, int]:
    """Name within a layer of each projection that gets a low rank -> that rank, if a share of attention stays."""
    query, key, value, output = dense.family.attention_modules
    sizes = {name: dense.tensors[dense.units.tensor(0, f"{name}.weight")].shape for name in (query, key, value, output)}
    first, second = (sum(math.prod(sizes[name]) for name in pair) for pair in ((value, output), (query, key)))
    budget = share * (first + second)
    of_first = min(budget * SPLIT / (1 + SPLIT), first)
    kept = dict.fromkeys((value, output), of_first / first) | dict.fromkeys((query, key), (budget - of_first) / second)
    ranks = {name: max(1, int(kept[name] * math.prod(size) / sum(size))) for name, size in sizes.items()}
    return {
        name: rank
        for name, rank in ranks.items()
        if kept[name] < 1 and rank * sum(sizes[name]) < math.prod(sizes[name])
    }
