"""The numbers that decide what stays of a model; scores and measurements decide the rest."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.budget import budget_of
from hfprune_dist.planning.shapes import shapes_for
from hfprune_dist.planning.targets import divisible, target_of
from hfprune_dist.planning.whole_expert_shapes import mixture_target
from hfprune_dist.structures import EXPERTS, NEURONS


def deciding_numbers(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> Hashable:
    """The numbers that decide what stays, together with scores and measurements.

    Args:
        method: with numbers, as ``with_numbers`` returns it.

    Raises:
        UserError: if the ratio is out of reach, or if nothing would be removed.
    """
    target = target_of(method, checkpoint, ratio, where)
    shapes = shapes_for(target, method)
    if shapes:
        return tuple((it.layers, *it.units.items(), *it.ranks.items()) for it in shapes)
    # The smallest step is one of a layer's width.
    step = target.multiple_of * target.counts.units[NEURONS]
    return (budget_of(target, method.limits()).parameters + step // 2) // step


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
