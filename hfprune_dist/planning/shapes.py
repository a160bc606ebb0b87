"""The shapes that a method may make of a model, as far as the ratio decides them."""

from __future__ import annotations

from hfprune_dist.config.method import Method
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.planning.expert_shapes import mixture_target
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.planning.low_rank_shapes import LowRankTarget
from hfprune_dist.planning.plain_shapes import plain_shapes, shape_of
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Shape


def shapes_for(target: ShapeTarget, settings: Method | PruneParameters) -> list[Shape]:
    """The shapes that compete for a ratio: a single one if the ratio decides; none if scores or a search do.

    Args:
        settings: the method, with numbers, or the stage that prunes by it. With allocation: plain, which layers stay is
            measured, and the shapes have the first ones.

    Raises:
        UserError: if none comes to the ratio, or rounding leaves nothing to remove.
    """
    if target.checkpoint.family.experts:
        return [mixture_target(target).shape()]
    match settings.allocation:
        case "uniform":
            return [uniform_shape(target)]
        case "plain":
            return [shape_of(target, it) for it in plain_shapes(target)]
        case "local":
            return [LocalTarget(target, *settings.protected()).shape()]
        case "low_rank":
            return [LowRankTarget(target).shape()]
    return []


def uniform_shape(target: ShapeTarget) -> Shape:
    """The shape with one width of all layers, as close to the ratio as rounding allows; of a model whose layers are
    alike.

    Raises:
        UserError: if neurons alone can't make up the ratio, or rounding leaves nothing to remove.
    """
    counts, most, multiple_of = target.counts, target.neurons.most, target.multiple_of
    narrowest = _of_width(target, min(multiple_of, most))
    if target.ratio > counts.ratio(narrowest):
        raise target.out_of_reach(counts.ratio(narrowest), "")
    exact = most - target.ratio * counts.total / (len(narrowest.layers) * counts.units[NEURONS])
    width = max(multiple_of, round(exact / multiple_of) * multiple_of)
    if width >= most:
        raise target.removes_nothing()
    return _of_width(target, width)


def _of_width(target: ShapeTarget, width: int) -> Shape:
    layers = range(target.checkpoint.num_layers)
    return Shape(tuple(layers), {NEURONS: (width,) * len(layers)})
