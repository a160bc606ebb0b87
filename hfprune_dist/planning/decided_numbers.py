"""The numbers that decide what stays of a model; scores and measurements decide the rest."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.budget import budget_of
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.planning.low_rank_shapes import LowRankTarget
from hfprune_dist.planning.plain_shapes import plain_shapes
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.targets import divisible, limits_of, protected_by, target_of
from hfprune_dist.planning.whole_expert_shapes import mixture_target
from hfprune_dist.planning.widths import ModelSize, Target, size_of
from hfprune_dist.structures import EXPERTS, NEURONS


def deciding_numbers(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> Hashable:
    """The numbers that decide what stays, together with scores and measurements.

    Args:
        method: with numbers, as ``with_numbers`` returns it.

    Raises:
        UserError: if the ratio is out of reach, or if nothing would be removed.
    """
    target = target_of(method, checkpoint, ratio, where)
    if method.allocation == "plain":
        return tuple(plain_shapes(target))
    if checkpoint.family.experts:
        return tuple(mixture_target(target).shape().units.items())
    if method.allocation == "local":
        return tuple(LocalTarget(target, *protected_by(method)).shape().units.values())
    if method.allocation == "low_rank":
        shape = LowRankTarget(target).shape()
        return *shape.ranks.items(), *shape.units.items()
    if method.structures == [NEURONS]:
        return _widths(size_of(checkpoint), target, method)
    # The smallest step is one of a layer's width.
    step = target.multiple_of * target.counts.units[NEURONS]
    return (budget_of(target, limits_of(method)).parameters + step // 2) // step


def check_multiple(checkpoint: Checkpoint, method: Method, where: str) -> None:
    """Refuse multiples that are larger than all there is."""
    most, what = checkpoint.units.width, "neurons"
    if EXPERTS in method.structures:
        most, what = checkpoint.structures[EXPERTS].most, EXPERTS
    if isinstance(method.multiple_of, int) and method.multiple_of > most:
        split = divisible(1, method)
        shared = f" with prune.tensor_parallel {split}" if split > 1 else ""
        raise UserError(
            f"{where}: prune.multiple_of comes to {method.multiple_of}{shared}, but layers have {most} {what} at most; "
            f"use {_smaller_multiple(most, split)}"
        )


def _smaller_multiple(most: int, split: int) -> str:
    """The settings whose least common multiple with ``split``, the number of devices, is ``most`` at most."""
    if split > most:
        return f"a prune.tensor_parallel up to {most}"
    return f"a number up to {most // split}" + (f", or a multiple of {split} up to {most}" if split > 1 else "")


def what_is_rounded(checkpoint: Checkpoint, method: Method) -> tuple[str, int, str]:
    """What is rounded, to multiples of which number, and a setting that makes it smaller; empty if none does."""
    smaller = "a smaller prune.multiple_of"
    if not checkpoint.family.experts:
        assert isinstance(method.multiple_of, int), "planned with a number"
        return "widths", method.multiple_of, smaller if method.multiple_of > divisible(1, method) else ""
    asked = target_of(method, checkpoint, 0.0, "")
    step, finest = (mixture_target(it).step for it in (asked, replace(asked, multiple_of=1)))
    what = "numbers of experts" if EXPERTS in method.structures else "widths of experts"
    return what, step, smaller if step > finest else ""


def _widths(size: ModelSize, asked: ShapeTarget, method: Method) -> tuple[int, ...]:
    target = Target(size, asked.ratio, asked.multiple_of, asked.where)
    numbers: list[int] = []
    if method.allocation != "uniform":  # first, since floors allow less than widths that are the same in all layers
        wanted = target.removals(target.narrowest_widths(*limits_of(method)))
        # If every layer shrinks in steps of this size only, the closest number of steps is taken.
        all_alike = all(count % target.multiple_of == 0 for count in size.counts)
        numbers.append((wanted + target.multiple_of // 2) // target.multiple_of if all_alike else wanted)
    if method.allocation not in ("global", "standardized") and asked.neurons.is_uniform:
        numbers.append(target.uniform_width())
    return tuple(numbers)
