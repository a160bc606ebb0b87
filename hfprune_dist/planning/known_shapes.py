"""The shapes of a sweep's checkpoints, as far as they are known before its first stage has run."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.pruned_config import parameters_of_biases, pruned_config
from hfprune_dist.config.method import Method
from hfprune_dist.planning.multiples import with_numbers
from hfprune_dist.planning.plain_shapes import plain_shapes, possible_outcomes
from hfprune_dist.planning.shape_target import target_of
from hfprune_dist.planning.shapes import shapes_for
from hfprune_dist.structures import EXPERTS, KV_GROUPS, LAYERS
from hfprune_dist.structures.kept import Shape

Number = TypeVar("Number", int, float)


@dataclass(frozen=True)
class Span(Generic[Number]):
    """The smallest and the largest of some numbers, taken over layers or competing shapes."""

    least: Number
    most: Number

    @classmethod
    def of(cls, numbers: Iterable[Number]) -> Span[Number]:
        """The span of at least one number."""
        every = sorted(numbers)
        return cls(every[0], every[-1])


@dataclass(frozen=True)
class KnownShape:
    """A checkpoint's shape as far as the plan decides it.

    Attributes:
        layers: how many it has; None as for ``kv_heads``.
        kv_heads: of each layer; None: scores or measurements decide.
        width: neurons of each layer, or of each of its experts; None as for ``kv_heads``.
        reached: removed parameters / parameters of the dense model; None as for ``kv_heads``.
        open: what decides the numbers that the plan leaves open; empty if it leaves none open.
        experts: of each layer that has some; None if no layer has any.
    """

    layers: Span[int] | None
    kv_heads: Span[int] | None
    width: Span[int] | None
    reached: Span[float] | None
    open: str = ""
    experts: Span[int] | None = None


def dense_shape(checkpoint: Checkpoint) -> KnownShape:
    """The shape of a model as it is."""
    sizes = Span.of([checkpoint.num_layers]), _kv_heads(checkpoint), _widths(checkpoint), Span.of([0.0])
    return KnownShape(*sizes, experts=_experts(checkpoint, Shape(tuple(range(checkpoint.num_layers)))))


def known_shape(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> KnownShape:
    """The shape of the checkpoint that a method makes of a model.

    Args:
        where: the model and the method, for messages.

    Raises:
        UserError: if the method can't reach the ratio, unless scores or a search decide the shape.
    """
    method = with_numbers(method, checkpoint, ratio, where)
    known = _known_shape(checkpoint, ratio, method, where)
    if method.refit != "bias" or known.reached is None:
        return known
    outputs = [units.output for units in checkpoint.pruned_kinds(method.structures)]
    biased = pruned_config(checkpoint, Shape(tuple(range(checkpoint.num_layers))), outputs)
    added = parameters_of_biases(checkpoint, biased) / checkpoint.parameters
    return replace(known, reached=Span(known.reached.least - added, known.reached.most - added))


def _known_shape(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> KnownShape:
    """The same for a method with numbers, without counting the biases that it adds."""
    target = target_of(method, checkpoint, ratio, where)
    shapes = shapes_for(target, method)
    if not shapes:
        return KnownShape(
            layers=None if LAYERS in method.structures else Span.of([checkpoint.num_layers]),
            kv_heads=None if KV_GROUPS in method.structures else _kv_heads(checkpoint),
            width=None,
            reached=None,
            open=f"{'a search decides' if method.allocation == 'searched' else 'scores decide'}, layer by layer",
        )
    outcomes = shapes
    if method.allocation == "plain":  # which layers go is measured, and the width makes up for their sizes
        outcomes = [shape for plain in plain_shapes(target) for shape in possible_outcomes(target, plain)]
    units, groups = checkpoint.units, checkpoint.structures[KV_GROUPS]
    return KnownShape(
        layers=Span.of(len(shape.layers) for shape in shapes),
        kv_heads=Span.of(count for shape in shapes for count in shape.counts(groups)),
        width=Span.of(count // units.copies for shape in outcomes for count in shape.counts(units) if count),
        reached=Span.of(map(target.counts.ratio, outcomes)),
        open=f"the closest of {len(shapes)} shapes, by measurement" if len(shapes) > 1 else "",
        experts=_experts(checkpoint, shapes[0]),
    )


def _widths(checkpoint: Checkpoint) -> Span[int]:
    """Widths of its layers' MLPs, or of its experts."""
    return Span.of(count // checkpoint.units.copies for count in checkpoint.units.counts if count)


def _experts(checkpoint: Checkpoint, shape: Shape) -> Span[int] | None:
    units = checkpoint.structures.get(EXPERTS)
    return None if units is None else Span.of(count for count in shape.counts(units) if count)


def _kv_heads(checkpoint: Checkpoint) -> Span[int]:
    return Span.of(checkpoint.structures[KV_GROUPS].counts)
