"""The numbers that decide what stays of a model, in each round to a ratio; scores and measurements decide the rest."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from itertools import pairwise

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.budget import budget_of
from hfprune_dist.planning.low_rank_shapes import LowRankTarget
from hfprune_dist.planning.rounds import round_ratios
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.shapes_of_rounds import local_shapes, plain_shapes_of_rounds
from hfprune_dist.planning.targets import divisible, limits_of, target_of
from hfprune_dist.planning.whole_expert_shapes import mixture_target
from hfprune_dist.planning.widths import ModelSize, NoShapeError, OutOfReachError, Target, size_of, to_multiples_of
from hfprune_dist.structures import EXPERTS, NEURONS


def decided_by_rounds(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> Hashable:
    """The numbers that decide what stays in each round to a ratio.

    Args:
        method: with numbers, as ``with_numbers`` returns it.

    Raises:
        UserError: if the ratio is out of reach, or if a round removes nothing or leaves what makes a later one
            impossible.
    """
    try:
        return _decided_by_rounds(checkpoint, ratio, method, where)
    except OutOfReachError as error:
        if len(round_ratios(method, ratio)) == 1 or _is_possible(checkpoint, error.largest, method, where):
            raise
        raise UserError(f"{error} (in a single round)") from None


def _is_possible(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> bool:
    """Whether a method's rounds lead to a ratio that is possible in a single one."""
    try:
        _decided_by_rounds(checkpoint, ratio, method, where)
    except UserError:
        return False
    return True


def _decided_by_rounds(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> Hashable:
    rounds = round_ratios(method, ratio)

    def impossible(why: str) -> UserError:
        what, step, finer = what_is_rounded(checkpoint, method)
        return UserError(
            f"{where}: of {len(rounds)} rounds to ratio {ratio:g}, {why} once {what} are rounded"
            f"{to_multiples_of(step)}; use {fewer_rounds(method)} or another ratio{finer and f' or {finer}'}"
        )

    if method.allocation == "plain":
        return tuple(map(tuple, plain_shapes_of_rounds(method, checkpoint, ratio, where)))
    try:
        decided = _decided_one_by_one(checkpoint, ratio, method, where)
    except NoShapeError as error:
        if error.ratio == ratio:
            raise
        raise impossible(f"no shape comes to the one that ends at {error.ratio:g}") from None
    for (before, then), (earlier, later) in zip(pairwise(rounds), pairwise(decided), strict=True):
        if earlier == later:
            raise impossible(f"the one from {before:g} to {then:g} removes nothing")
    return tuple(decided)


def _decided_one_by_one(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> list[Hashable]:
    """The deciding numbers of each round; a ratio that is itself impossible is reported before any round's."""
    if method.allocation == "local" and not checkpoint.family.experts:
        return [tuple(shape.units.values()) for shape in local_shapes(method, checkpoint, ratio, where)]
    last = _deciding_numbers(checkpoint, ratio, method, where)
    earlier = round_ratios(method, ratio)[:-1]
    return [*(_deciding_numbers(checkpoint, it, method, where) for it in earlier), last]


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


def fewer_rounds(method: Method) -> str:
    """The setting that makes rounds larger, for messages."""
    return "fewer steps" if method.round_ratio is None else "a larger prune.round_ratio"


def _deciding_numbers(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> Hashable:
    """The numbers that decide what stays, together with scores and measurements."""
    target = target_of(method, checkpoint, ratio, where)
    if method.allocation == "low_rank":
        shape = LowRankTarget(target).shape()
        return *shape.ranks.items(), *shape.units.items()
    if checkpoint.family.experts:
        return tuple(mixture_target(target).shape().units.items())
    if method.structures == [NEURONS]:
        return _widths(size_of(checkpoint), target, method)
    # The smallest step is one of a layer's width.
    step = target.multiple_of * target.counts.units[NEURONS]
    return (budget_of(target, limits_of(method)).parameters + step // 2) // step


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
