"""The shapes that a method may make of a model, and the closest of them to a ratio.

A ratio is removed parameters / all parameters of the model, as in the paper, not the share of units removed (20 % of
Llama-3.2-1B is 31 % of its neurons). A shape is what each layer keeps. Candidates lie on lines, along which one size
grows; on each line, the shape whose parameters come closest to the ratio is taken. Where several lines have one,
measurements decide, or for ``allocation: local`` the share of KV groups. Where units of all layers compete by score,
a ``Target`` only bounds the shapes.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.layer_settings import undroppable_layers
from hfprune_dist.checkpoints.pruned_config import plain_group_counts
from hfprune_dist.config.method import Allocation, Method
from hfprune_dist.errors import UserError
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.kinds.training import LoraPruneParameters
from hfprune_dist.structures import EXPERT_NEURONS, EXPERTS, KV_GROUPS, LAYERS, NEURONS, Structure
from hfprune_dist.structures.kept import ParameterCounts, Shape
from hfprune_dist.structures.units import Units

# Allocations with which scores or a search divide what goes among layers.
COMPETING = ("global", "standardized", "searched")
# The most plain shapes that are measured for a ratio, and the most different numbers of KV groups among them.
MOST_SHAPES, MOST_GROUP_COUNTS = 24, 4
# Numbers of layers are tried in steps of one layer for every LAYERS_OF_A_STEP layers of the model.
LAYERS_OF_A_STEP = 15
# Experts' matrices are multiplied in groups, for which torch requires rows of whole 16 bytes: 8 numbers of 2 bytes.
ALIGNED = 8
# LoRAP (arXiv 2404.09695): ratio of the parameters of v and o that stay to those of q and k.
SPLIT = 3

T = TypeVar("T")


@dataclass(frozen=True)
class Target:
    """The ratio that a method asks for, and the bounds on shapes that come to it.

    Attributes:
        dense: the model, of whose parameters ``ratio`` is the share to remove.
        where: the model and the method, for messages.
        multiple_of: widths of layers that lose neurons, or numbers of experts, are multiples of it.
        tensor_parallel: numbers of KV groups are divisible by it, if ``structures`` has them.
        floor: the least share of its neurons that a layer keeps, where layers compete.
        protect_first, protect_last: how many of the first and last layers lose nothing.
    """

    dense: Checkpoint
    ratio: float
    where: str
    structures: tuple[Structure, ...] = (NEURONS,)
    allocation: Allocation = "uniform"
    multiple_of: int = 1
    tensor_parallel: int = 1
    floor: float = 0.0
    protect_first: int = 0
    protect_last: int = 0

    @classmethod
    def of(
        cls, dense: Checkpoint, settings: Method | PruneParameters | LoraPruneParameters, ratio: float, where: str
    ) -> Target:
        """The target of a method with numbers (``with_numbers``), or of a stage that prunes."""
        allocation: Allocation = "local" if isinstance(settings, LoraPruneParameters) else settings.allocation
        floor = 0.0 if isinstance(settings, LoraPruneParameters) else settings.floor or 0.0
        protects = allocation in (*COMPETING, "local")
        first, last = settings.protect_first or 0, settings.protect_last or 0
        assert isinstance(settings.multiple_of, int) and isinstance(first, int) and isinstance(last, int)
        return cls(
            dense,
            ratio,
            where,
            tuple(settings.structures),
            allocation,
            settings.multiple_of,
            settings.tensor_parallel if KV_GROUPS in settings.structures else 1,
            floor if allocation in COMPETING else 0.0,
            first if protects else 0,
            last if protects else 0,
        )

    @property
    def counts(self) -> ParameterCounts:
        return self.dense.parameter_counts

    @property
    def neurons(self) -> Units:
        return self.dense.structures[NEURONS]

    @property
    def groups(self) -> Units:
        return self.dense.structures[KV_GROUPS]

    @property
    def competes(self) -> bool:
        """Whether scores or a search divide what goes among layers."""
        return self.allocation in COMPETING

    @property
    def removals(self) -> float:
        """Parameters to remove."""
        return self.ratio * self.counts.total

    @property
    def pruned_layers(self) -> range:
        """The layers that aren't protected."""
        last = max(self.dense.num_layers - self.protect_last, 0)
        return range(min(self.protect_first, last), last)

    @property
    def fewest_layers(self) -> int:
        """How many layers must stay: at least two thirds, since no refit recovers what dropping more of them loses."""
        if LAYERS not in self.structures:
            return self.dense.num_layers
        return max(-(-2 * self.dense.num_layers // 3), len(undroppable_layers(self.dense.config)))

    @cached_property
    def droppable(self) -> tuple[int, ...]:
        """The layers that may be removed."""
        if LAYERS not in self.structures:
            return ()
        return tuple(layer for layer in self.pruned_layers if layer not in undroppable_layers(self.dense.config))

    def numbers_of_layers(self) -> range:
        """The numbers of layers that are tried, descending."""
        return range(self.dense.num_layers, self.fewest_layers - 1, -step_of_layers(self.dense.num_layers))

    def fewest(self, kind: str) -> tuple[int, ...]:
        """The fewest units of a kind that each layer keeps where layers compete, if it stays itself."""
        counts = self.dense.structures[kind].counts
        if kind not in self.structures:
            return counts
        shares = [0.0 if kind == KV_GROUPS else self.floor * count for count in counts]
        step = self.tensor_parallel if kind == KV_GROUPS else self.multiple_of
        fewest = [-(-max(1, round(share)) // step) * step for share in shares]
        pairs = enumerate(zip(fewest, counts, strict=True))
        return tuple(min(pair) if layer in self.pruned_layers else pair[1] for layer, pair in pairs)

    def most_layers_gone(self) -> int:
        """How many layers may go: as many as bounds allow, or the first number tried whose layers exceed the ratio."""
        sizes, num_layers = self.counts.layers, self.dense.num_layers
        most = min(len(self.droppable), num_layers - self.fewest_layers)
        smallest_first = sorted(sizes[layer] for layer in self.droppable)
        tried = range(0, most, step_of_layers(num_layers))
        return next((gone for gone in tried if sum(smallest_first[:gone]) > self.removals), most)

    def unusable_split(self, largest: int) -> UserError:
        """The error if ``tensor_parallel`` divides no possible number of KV groups."""
        return UserError(
            f"{self.where}: prune.tensor_parallel {self.tensor_parallel} divides no number of KV groups that its "
            f"{self.groups.most} can be pruned to; the largest that works is {largest}"
        )

    def out_of_reach(self, nearest: float | None) -> UserError:
        """The error for a ratio that no shape comes to.

        Args:
            nearest: the ratio of the shape that comes closest; None if nothing can go.
        """
        bounds = "floor", "multiple_of", "tensor_parallel", "protect_first", "protect_last"
        set_so = {name: getattr(self, name) for name in bounds if getattr(self, name) != getattr(type(self), name)}
        told = f" with {', '.join(f'{name} {value}' for name, value in set_so.items())}" if set_so else ""
        # Rounded down, so that it can be reached.
        possible = "nothing can go" if nearest is None else f"the nearest possible is {int(nearest * 1e6) / 1e6:g}"
        return UserError(
            f"{self.where}: ratio {self.ratio:g} can't be reached by pruning {', '.join(self.structures)}{told}; "
            f"{possible}"
        )


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


@dataclass(frozen=True)
class Closest:
    """The closest shape of a line, its ratio, and whether that is close enough."""

    shape: Shape
    ratio: float
    fits: bool


def step_of_layers(num_layers: int) -> int:
    """By how much the numbers of layers that are tried differ, for a model with ``num_layers``."""
    return max(1, round(num_layers / LAYERS_OF_A_STEP))


def closest_multiple(exact: float, width: int, multiple_of: int) -> int:
    """The number of units closest to ``exact`` that a layer may keep: all ``width`` of them, or fewer in a multiple."""
    multiple = max(multiple_of, round(exact / multiple_of) * multiple_of)
    return min((min(multiple, width), width), key=lambda kept: abs(kept - exact))


def closest(target: Target, line: Line) -> Closest | None:
    """The shape of a line that comes closest to the ratio; None if none removes anything."""
    counts, wanted = target.counts, target.counts.total - target.removals

    def parameters(size: int) -> int:
        return counts.of(line.shape(size))

    sizes = line.sizes
    if sizes and parameters(sizes[-1]) == counts.total:  # the model as it is
        sizes = sizes[: bisect_left(sizes, counts.total, key=parameters)]
    if not sizes:
        return None
    above = bisect_right(sizes, wanted + 0.5, key=parameters)  # ratios are rounded to less than a parameter
    around = sizes[max(above - 1, 0) : above + (not line.at_least or not above)]
    shape = min(map(line.shape, around), key=lambda it: abs(counts.of(it) - wanted))
    beyond = wanted - counts.of(shape)
    return Closest(shape, counts.ratio(shape), (-0.5 if line.at_least else -line.slack) <= beyond <= line.slack)


def shapes_for(target: Target) -> list[Shape]:
    """The shapes that compete for a ratio: a single one if the ratio decides; none if scores or a search do.

    With ``allocation: plain``, which layers stay is measured, and the shapes have the first ones.

    Raises:
        UserError: if no shape comes to the ratio.
    """
    if target.competes:
        _require_budget(target)
        return []
    found = [it for it in (closest(target, line) for line in _lines(target)) if it is not None]
    fitting = [it.shape for it in found if it.fits]
    if not fitting:
        ratios = [it.ratio for it in found]
        raise target.out_of_reach(min(ratios, key=lambda it: abs(it - target.ratio), default=None))
    if target.allocation == "plain":
        return spread(fitting, MOST_SHAPES)
    return fitting if len(fitting) == 1 else [min(fitting, key=lambda shape: _excess_of_groups(target, shape))]


def shape_for(target: Target) -> Shape:
    """The shape that a ratio decides."""
    (shape,) = shapes_for(target)
    return shape


def plain_shapes(target: Target) -> list[Shape]:
    """Every plain shape that comes to the ratio, whatever the allocation; none if layers differ already."""
    found = (closest(target, line) for line in _plain_lines(target)) if target.dense.is_uniform else ()
    return [it.shape for it in found if it is not None and it.fits]


def _lines(target: Target) -> list[Line]:
    if target.dense.family.experts:
        return [_line_of_experts(target) if EXPERTS in target.structures else _line_of_expert_neurons(target)]
    match target.allocation:
        case "plain":
            return _plain_lines(target)
        case "low_rank":
            return [_low_rank_line(target)]
    return [_local_line(target, row) for row in _rows_of_groups(target)] if target.pruned_layers else []


# One width, or the same share of each layer's units.


def _local_line(target: Target, groups: Sequence[int]) -> Line:
    """Shapes in which the layers that aren't protected have ``groups``, and lose the same share of their neurons."""
    layers, most, widths = range(target.dense.num_layers), target.neurons.most, target.neurons.counts
    of_layer = dict(zip(target.pruned_layers, groups, strict=True))
    all_groups = tuple(of_layer.get(layer, count) for layer, count in enumerate(target.groups.counts))

    def shape(size: int) -> Shape:
        narrowed = (closest_multiple(size * width / most, width, target.multiple_of) for width in widths)
        kept = tuple(it if layer in of_layer else widths[layer] for layer, it in enumerate(narrowed))
        return Shape(tuple(layers), {NEURONS: kept, KV_GROUPS: all_groups})

    return Line(range(1, most + 1), shape, _parameters_of_a_step(target, len(groups)) / 2)


def _rows_of_groups(target: Target) -> list[tuple[int, ...]]:
    """The numbers of KV groups that the layers that aren't protected may have; without protected ones, and if all
    layers are alike, the checkpoint stays plain.
    """
    counts, split = [target.groups.counts[layer] for layer in target.pruned_layers], target.tensor_parallel
    if KV_GROUPS not in target.structures:
        return [tuple(counts)]
    if target.groups.is_uniform and len(counts) == target.dense.num_layers:
        return [(count,) * len(counts) for count in _plain_groups(target)]
    _require_divisible(target)
    most = target.groups.most
    rows = [
        tuple(max(split, round(kept / most * it / split) * split) for it in counts)
        for kept in range(split, most + 1, split)
    ]
    return list(dict.fromkeys(rows))


def _excess_of_groups(target: Target, shape: Shape) -> float:
    """How far the share of KV groups that stay, in the layers that aren't protected, is from that of all units."""
    counts, every = target.counts, target.groups.counts
    groups = sum(every[layer] for layer in target.pruned_layers)
    neurons = sum(target.neurons.counts[layer] for layer in target.pruned_layers)
    share = 1 - target.removals / max(1, counts.units[NEURONS] * neurons + counts.units[KV_GROUPS] * groups)
    gone = sum(every) - sum(shape.units.get(KV_GROUPS, every))
    return abs(1 - gone / max(1, groups) - share)


def _plain_groups(target: Target) -> list[int]:
    """The numbers of KV groups that all layers of a plain checkpoint may have, ascending."""
    plain = plain_group_counts(target.dense)
    divisible = [count for count in plain if count % target.tensor_parallel == 0]
    if not divisible:
        raise target.unusable_split(plain[-1])
    return divisible


def _require_divisible(target: Target) -> None:
    divisor = math.gcd(*target.groups.counts)
    if KV_GROUPS in target.structures and divisor % target.tensor_parallel:
        raise target.unusable_split(divisor)


def _parameters_of_a_step(target: Target, num_layers: int) -> int:
    return target.multiple_of * num_layers * target.counts.units[NEURONS]


# Plain shapes: a number of layers, and numbers of KV groups and neurons that are the same in all of them.


def numbers_of_groups(target: Target) -> list[int]:
    """The numbers of KV groups that plain shapes have, descending: at least a quarter of the dense model's."""
    most = target.groups.most
    if KV_GROUPS not in target.structures:
        return [most]
    return spread([count for count in _plain_groups(target)[::-1] if 4 * count >= most] or [most], MOST_GROUP_COUNTS)


def _plain_lines(target: Target) -> list[Line]:
    """One for each number of layers, then of KV groups, descending."""
    groups = numbers_of_groups(target)
    return [_plain_line(target, range(number), count) for number in target.numbers_of_layers() for count in groups]


def _plain_line(target: Target, layers: Iterable[int], groups: int) -> Line:
    """Shapes with these layers. With ``multiple_of`` 1, parameters come as close to the ratio as possible; with larger
    multiples, at least the ratio is removed.
    """
    kept, multiple_of = tuple(layers), target.multiple_of
    step = _parameters_of_a_step(target, len(kept))

    def shape(width: int) -> Shape:
        return Shape(kept, {NEURONS: (width,) * len(kept), KV_GROUPS: (groups,) * len(kept)})

    widths = range(multiple_of, target.neurons.most + 1, multiple_of)
    return Line(widths, shape, step / 2 if multiple_of == 1 else step - 1, at_least=multiple_of > 1)


def with_layers(target: Target, layers: Iterable[int], groups: int) -> Shape | None:
    """The plain shape with these layers of the dense model, once it is known which stay, and the width that the ratio
    asks for; None if no width comes to it.
    """
    found = closest(target, _plain_line(target, layers, groups))
    return found.shape if found is not None and found.fits else None


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
    groups may go, layers keep the share of them that is closest.
    """
    dense, multiple_of = target.dense, target.multiple_of
    experts, kinds, layers = dense.structures[EXPERT_NEURONS], dense.pruned_kinds([NEURONS]), range(dense.num_layers)
    plain = _plain_groups(target) if KV_GROUPS in target.structures else []

    def width_of(kind: Units, size: int) -> int:
        rounded = kind.width * size // experts.width // multiple_of * multiple_of
        return max(rounded, min(multiple_of, kind.width))

    def shape(size: int) -> Shape:
        widths: dict[str, int] = {}
        for it in kinds:  # those that one field of config.json describes have one width
            widths.setdefault(next(iter(it.fields)), size if it is experts else width_of(it, size))
        units = {}
        for it in kinds:
            (name,) = {*it.fields} & widths.keys()
            units[it.kind] = tuple(widths[name] * it.copies if count else 0 for count in it.counts)
        if plain:
            groups = min(plain, key=lambda count: abs(count - size / experts.width * plain[-1]))
            units[KV_GROUPS] = (groups,) * len(layers)
        return Shape(tuple(layers), units)

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
    in_layers = (it.shape for name, it in dense.tensors.items() if name.startswith(f"{dense.family.layers}."))
    matrices = sum(math.prod(shape) for shape in in_layers if len(shape) == 2)
    ranks = {name: (it,) * len(layers) for name, it in _ranks(dense, max(0.0, 1 - target.removals / matrices)).items()}

    def shape(size: int) -> Shape:
        width = closest_multiple(size, most, target.multiple_of)
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


# Shapes in which layers compete.


def _require_budget(target: Target) -> None:
    """Check that scores or a search can remove what the ratio asks for.

    Raises:
        UserError: if bounds allow less, or rounding leaves nothing to remove.
    """
    _require_divisible(target)
    largest = _largest_ratio(target)
    if target.ratio > largest:
        raise target.out_of_reach(largest or None)
    steps = (count - (count - 1) // target.multiple_of * target.multiple_of for count in target.neurons.counts)
    smallest = min(steps) * target.counts.units[NEURONS]
    if 2 * target.removals < smallest:
        raise target.out_of_reach(smallest / target.counts.total)


def _largest_ratio(target: Target) -> float:
    """The ratio at which everything that may go is gone. Measurements decide which layers go; where layers differ, this
    counts on those whose removal leaves the most behind.
    """
    num_layers, fewest = target.dense.num_layers, {kind: target.fewest(kind) for kind in (NEURONS, KV_GROUPS)}

    def without(gone: Sequence[int]) -> float:
        layers = tuple(layer for layer in range(num_layers) if layer not in gone)
        units: dict[str, tuple[int, ...]] = {
            kind: tuple(counts[layer] for layer in layers) for kind, counts in fewest.items()
        }
        return target.counts.ratio(Shape(layers, units))

    least_first = sorted(target.droppable, key=lambda layer: without([layer]))
    return without(least_first[: num_layers - target.fewest_layers])
