"""A method's settings as numbers for one model: what widths are multiples of, and how many layers lose nothing.

Multiples are sizes that run fast on hardware, if that costs few parameters, and that can be split over devices.
"""

from __future__ import annotations

from dataclasses import replace

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.budget import Limits, budget_of
from hfprune_dist.planning.decided_numbers import check_multiple
from hfprune_dist.planning.expert_shapes import ExpertTarget
from hfprune_dist.planning.legality import suited
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.planning.low_rank_shapes import LowRankTarget
from hfprune_dist.planning.plain_shapes import all_plain_shapes, ratio_of
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.targets import divisible, limits_of, protected_by, target_of
from hfprune_dist.planning.widths import Target, size_of
from hfprune_dist.structures import EXPERTS, NEURONS

# Multiples, in the order in which they are tried.
MULTIPLES = (256, 128, 64, 32)
# The share of all parameters that may be removed beyond the ratio.
MOST_BEYOND = 0.0125
# From width WIDE on, every multiple is at least LEAST.
WIDE, LEAST = 1024, 32


def with_numbers(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> Method:
    """The method as it suits the model, with numbers for ``multiple_of`` and the protected layers; if KV groups
    may go, ``tensor_parallel`` divides ``multiple_of``.

    Raises:
        UserError: if ``tensor_parallel`` divides no number of KV groups.
    """
    method = _with_protected(suited(method, checkpoint), checkpoint)
    multiple_of = method.multiple_of
    if multiple_of == "auto":
        multiple_of = _what_auto_is(method, checkpoint, ratio, where)
    return method.model_copy(update={"multiple_of": divisible(multiple_of, method)})


def _with_protected(method: Method, checkpoint: Checkpoint) -> Method:
    """Replace shares of the layers by the nearest whole numbers."""
    given = {"protect_first": method.protect_first, "protect_last": method.protect_last}
    shares = {name: it for name, it in given.items() if isinstance(it, float)}
    return method.model_copy(update={name: round(it * checkpoint.num_layers) for name, it in shares.items()})


def _what_auto_is(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> int:
    """If shapes compete, a number with which every plain shape of the method's structures is possible; for experts, 1.

    Shapes are compared at one multiple, which rules none of them out. Multiples are
    tried as ``tensor_parallel`` leaves them: on three devices, 256 is 768. None exceeds the widths themselves.
    """
    if EXPERTS in method.structures:
        return 1
    tried = [divisible(it, method) for it in MULTIPLES]
    fitting = (
        it
        for it in tried
        if _suits(it, method, checkpoint, ratio, where)
        and _is_possible(method.model_copy(update={"multiple_of": it}), checkpoint, where)
    )
    return next(fitting, LEAST if checkpoint.units.width >= WIDE else 1)


def _suits(multiple_of: int, method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> bool:
    if checkpoint.family.experts:
        rounded = target_of(method.model_copy(update={"multiple_of": multiple_of}), checkpoint, ratio, where)
        return _suits_alone(ExpertTarget(rounded))
    if method.allocation == "uniform":
        size = size_of(checkpoint)
        width = Target(size, ratio, multiple_of, where).closest_width()
        return ratio <= size.reached([width] * size.num_layers) <= ratio + MOST_BEYOND
    finest = target_of(method.model_copy(update={"multiple_of": 1}), checkpoint, ratio, where)
    target = replace(finest, multiple_of=multiple_of)
    if method.allocation == "local":
        return _suits_alone(LocalTarget(target, *protected_by(method)))
    if method.allocation == "low_rank":
        return _suits_alone(LowRankTarget(target))
    shapes = all_plain_shapes(target)
    as_many = len(shapes) == len(all_plain_shapes(finest)) > 0
    little = as_many and all(ratio_of(target, shape) <= ratio + MOST_BEYOND for shape in shapes)
    return little and (method.allocation == "plain" or _within_limits(target, limits_of(method)))


def _is_possible(method: Method, checkpoint: Checkpoint, where: str) -> bool:
    """Whether planning accepts the multiple."""
    try:
        check_multiple(checkpoint, method, where)
    except UserError:
        return False
    return True


def _within_limits(target: ShapeTarget, limits: Limits) -> bool:
    """Whether layers that compete can come to the ratio with floors that are rounded up to the multiple."""
    try:
        if target.structures == (NEURONS,):
            widths = Target(size_of(target.checkpoint), target.ratio, target.multiple_of, target.where)
            widths.removals(widths.narrowest_widths(*limits))
        else:
            budget_of(target, limits)
    except UserError:
        return False
    return True


def _suits_alone(target: LocalTarget | LowRankTarget | ExpertTarget) -> bool:
    """Whether the only shape of a target reaches the ratio without going too far beyond it."""
    try:
        reached = target.asked.counts.ratio(target.shape())
    except UserError:
        return False
    return target.asked.ratio <= reached <= target.asked.ratio + MOST_BEYOND
