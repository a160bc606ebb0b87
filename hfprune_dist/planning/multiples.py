"""Settings of a method as numbers of a model: what its widths are multiples of, and how many layers lose nothing.

Multiples are what hardware likes, where that costs few parameters, and what devices can share.
"""

from __future__ import annotations

import math
from dataclasses import replace

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method, structures_possible
from hfprune_dist.errors import UserError
from hfprune_dist.planning.expert_shapes import ExpertTarget
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.planning.low_rank_shapes import LowRankTarget
from hfprune_dist.planning.plain_shapes import all_plain_shapes, ratio_of
from hfprune_dist.planning.rounds import round_ratios
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.widths import Target, size_of
from hfprune_dist.structures import EXPERTS, KV_GROUPS

# In the order in which they are tried.
MULTIPLES = (256, 128, 64, 32)
# The share of all parameters that may go beyond the ratio.
MOST_BEYOND = 0.0125
# From this width on, every multiple is at least this.
WIDE, LEAST = 1024, 32


def suited(method: Method, checkpoint: Checkpoint) -> Method:
    """A method that ``adapts``, without what the model's architecture rules out; any other as it is."""
    family, changes = checkpoint.family, dict[str, object]()
    if method.adapts and family.whole_groups:
        changes["structures"] = [it for it in method.structures if it != KV_GROUPS]
    if method.adapts and family.no_sequence and method.refit in ("layerwise", "block"):
        changes["refit"] = "dense"
    return method.model_copy(update=changes)


def with_numbers(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> Method:
    """A method as it suits the model, whose ``multiple_of`` is a number, which ``tensor_parallel`` divides where KV
    groups may go, and whose protected layers are numbers too.

    Raises:
        UserError: where ``tensor_parallel`` divides no number of KV groups.
    """
    method = _with_protected(suited(method, checkpoint), checkpoint)
    multiple_of = method.multiple_of
    if multiple_of == "auto":
        multiple_of = _what_auto_is(method, checkpoint, ratio, where)
    if KV_GROUPS in method.structures:
        multiple_of = math.lcm(multiple_of, method.tensor_parallel)
    return method.model_copy(update={"multiple_of": multiple_of})


def protected_by(method: Method) -> tuple[int, int]:
    """How many of the first and of the last layers lose nothing, of a method with such numbers."""
    first, last = method.protect_first, method.protect_last
    assert isinstance(first, int) and isinstance(last, int), "planned with numbers"
    return first, last


def _with_protected(method: Method, checkpoint: Checkpoint) -> Method:
    """Shares of the layers are rounded to the nearest number."""
    given = {"protect_first": method.protect_first, "protect_last": method.protect_last}
    shares = {name: it for name, it in given.items() if isinstance(it, float)}
    return method.model_copy(update={name: round(it * checkpoint.num_layers) for name, it in shares.items()})


def _what_auto_is(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> int:
    """Where shapes compete, a number with which every plain shape of the method's structures is possible; of experts 1.

    Shapes are compared at one multiple, and none is left out for it. Where rounds are of one size it is the first
    round's, so that they are the same rounds whatever ratio they lead to; a plain shape is to be one in every round.
    """
    if EXPERTS in method.structures:
        return 1
    decisive = [ratio if method.round_ratio is None else min(ratio, method.round_ratio)]
    if method.allocation == "plain":
        decisive = round_ratios(method, ratio)
    fitting = (it for it in MULTIPLES if all(_suits(it, method, checkpoint, each, where) for each in decisive))
    return next(fitting, LEAST if checkpoint.units.width >= WIDE else 1)


def target_of(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> ShapeTarget:
    """What a method whose ``multiple_of`` is a number asks of a shape."""
    assert isinstance(method.multiple_of, int), "planned with a number"
    structures, possible = tuple(method.structures), structures_possible(method.allocation)
    return ShapeTarget(checkpoint, ratio, structures, method.multiple_of, where, method.tensor_parallel, possible)


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
    return as_many and all(ratio_of(target, shape) <= ratio + MOST_BEYOND for shape in shapes)


def _suits_alone(target: LocalTarget | LowRankTarget | ExpertTarget) -> bool:
    """Of what asks for one shape."""
    try:
        reached = target.asked.counts.ratio(target.shape())
    except UserError:
        return False
    return target.asked.ratio <= reached <= target.asked.ratio + MOST_BEYOND
