"""Checks that a method can reach the given ratios on a model, and that they lead to different checkpoints."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.budget import budget_of
from hfprune_dist.planning.expert_shapes import can_do, refuse_unaligned, refuse_with_experts, why_not_experts
from hfprune_dist.planning.low_rank_shapes import LowRankTarget
from hfprune_dist.planning.multiples import divisible, limits_of, protected_by, suited, target_of, with_numbers
from hfprune_dist.planning.rounds import round_ratios
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.shapes_of_rounds import local_shapes, plain_shapes_of_rounds
from hfprune_dist.planning.students import check_student
from hfprune_dist.planning.whole_expert_shapes import mixture_target, refuse_without_experts
from hfprune_dist.planning.widths import ModelSize, Target, size_of, to_multiples_of
from hfprune_dist.structures import EXPERTS, KV_GROUPS, NEURONS
from hfprune_dist.structures.low_rank import rank_field


def check_ratios(checkpoint: Checkpoint, ratios: Sequence[float], method: Method, where: str) -> None:
    """Refuse ratios that a method can't reach on a model, or that would lead to the same checkpoint.

    Raises:
        UserError: naming the largest ratio within reach, or two ratios that are the same; or if the model's layers
            differ and the method makes all of them alike.
    """
    method = suited(method, checkpoint)
    _check_family(checkpoint, method, where)
    if checkpoint.ranks:
        raise UserError(
            f"{where}: its attention has matrices of low rank ({', '.join(map(rank_field, checkpoint.ranks))} in "
            "config.json), so it has been pruned already; prune the model that it came from, at a larger ratio"
        )
    if method.allocation in ("uniform", "plain", "low_rank") and not checkpoint.is_uniform:
        raise UserError(
            f"{where}: its layers differ in width or in heads, so it has been pruned already; allocation: "
            f"{method.allocation} makes them alike. Use a method whose allocation is local, global, standardized or "
            "searched, or prune the model that it came from, at a larger ratio"
        )
    reached: dict[Hashable, float] = {}
    for ratio in ratios:
        settled = with_numbers(method, checkpoint, ratio, where)
        _check_multiple(checkpoint, settled, where)
        _check_protected(checkpoint, settled, where)
        check_student(checkpoint, ratio, settled, where)
        decided = _of_all_rounds(checkpoint, ratio, settled, where)
        if decided in reached:
            what, step, finer = _rounded(checkpoint, settled)
            raise UserError(
                f"{where}: ratios {reached[decided]:g} and {ratio:g} would be the same checkpoint once {what} are "
                f"rounded{to_multiples_of(step)}; leave one of them out{finer and f' or use {finer}'}"
            )
        reached[decided] = ratio


def _check_family(checkpoint: Checkpoint, method: Method, where: str) -> None:
    """Refuse a method that the model's architecture doesn't permit."""
    family = checkpoint.family
    refuse_without_experts(method, checkpoint, where)
    if family.experts:
        refuse_with_experts(method, family.model_type, where)
        refuse_unaligned(checkpoint, where)
    if family.has_vision and (method.allocation not in ("uniform", "plain") or method.refit == "bias"):
        raise UserError(
            f"{where}: a model of images and text must stay plain, with layers that are alike and biases as they are: "
            "its allocation must be uniform or plain, and its refit not bias"
        )
    if KV_GROUPS in method.structures and family.whole_groups:
        raise UserError(
            f"{where}: KV groups of {family.model_type} can't be pruned: {family.whole_groups}; leave kv_groups out of "
            "prune.structures"
        )
    if method.allocation == "low_rank" and family.no_low_rank:
        raise UserError(
            f"{where}: allocation: low_rank isn't possible with {family.model_type}: {family.no_low_rank}; use "
            "a method of another allocation"
        )
    if method.refit in ("layerwise", "block") and family.no_sequence:
        raise UserError(
            f"{where}: refit: {method.refit} isn't possible with {family.model_type}: {family.no_sequence}; use dense "
            "or none"
        )


def _check_multiple(checkpoint: Checkpoint, method: Method, where: str) -> None:
    most, what = checkpoint.units.width, "neurons"
    if EXPERTS in method.structures:
        most, what = checkpoint.structures[EXPERTS].most, EXPERTS
    if isinstance(method.multiple_of, int) and method.multiple_of > most:
        split = f" with prune.tensor_parallel {method.tensor_parallel}" if method.tensor_parallel > 1 else ""
        raise UserError(
            f"{where}: prune.multiple_of comes to {method.multiple_of}{split}, but layers have {most} {what} at most; "
            f"use a number up to {most}"
        )


def _rounded(checkpoint: Checkpoint, method: Method) -> tuple[str, int, str]:
    """What is rounded, to multiples of which number, and a setting that makes it smaller; empty if none does."""
    smaller = "a smaller prune.multiple_of"
    if not checkpoint.family.experts:
        assert isinstance(method.multiple_of, int), "planned with a number"
        return "widths", method.multiple_of, smaller if method.multiple_of > divisible(1, method) else ""
    asked = target_of(method, checkpoint, 0.0, "")
    step, finest = (mixture_target(it).step for it in (asked, replace(asked, multiple_of=1)))
    what = "numbers of experts" if EXPERTS in method.structures else "widths of experts"
    return what, step, smaller if step > finest else ""


def _check_protected(checkpoint: Checkpoint, method: Method, where: str) -> None:
    first, last = protected_by(method)
    if method.can_protect and first + last >= checkpoint.num_layers:
        raise UserError(
            f"{where}: prune.protect_first {first} and prune.protect_last {last} leave none of its "
            f"{checkpoint.num_layers} layers to prune; together they must be less than {checkpoint.num_layers}"
        )


def remarks_on_shapes(checkpoint: Checkpoint, ratios: Sequence[float], method: Method, where: str) -> list[str]:
    """Sentences for dry runs about a method's settings that depend on the model.

    Raises:
        UserError: as ``check_ratios`` does.
    """
    if not can_do(method, checkpoint):
        return [f"{where}: left out, since the model is a mixture of experts; {why_not_experts(method)}"]
    told = _left_out(checkpoint, method, where)
    method = suited(method, checkpoint)
    if method.multiple_of == "auto":
        multiples = [(ratio, with_numbers(method, checkpoint, ratio, where).multiple_of) for ratio in ratios]
        told.append(f"{where}: multiple_of is {', '.join(f'{multiple} at {ratio:g}' for ratio, multiple in multiples)}")
    if method.allocation == "low_rank":
        told += [_told_of_ranks(checkpoint, ratio, method, where) for ratio in ratios]
    if method.allocation == "local" and not checkpoint.family.experts:
        told += [it for ratio in ratios for it in _told_of_groups(checkpoint, ratio, method, where)]
    return told


def largest_split(checkpoint: Checkpoint, ratios: Sequence[float], methods: Mapping[str, Method]) -> int | None:
    """The largest ``tensor_parallel`` with which all methods that may remove KV groups reach all ratios.

    Args:
        methods: what messages call a method -> the method.

    Returns:
        None if no method of these may remove KV groups of this model.
    """
    applied = {where: it for where, it in methods.items() if can_do(it, checkpoint)}
    removing = {where: it for where, it in applied.items() if KV_GROUPS in suited(it, checkpoint).structures}
    if not removing:
        return None
    groups = checkpoint.structures[KV_GROUPS].most

    def works(split: int) -> bool:
        return all(_splits(checkpoint, ratio, it, split, where) for where, it in removing.items() for ratio in ratios)

    return next(it for it in range(groups, 0, -1) if it == 1 or works(it))


def _left_out(checkpoint: Checkpoint, method: Method, where: str) -> list[str]:
    """What an adaptive method leaves out for this model, and why."""
    family, left = checkpoint.family, suited(method, checkpoint)
    told = [f"{where}: KV groups stay: {family.whole_groups}"] if left.structures != method.structures else []
    if left.refit != method.refit:
        norms = ", and no norm is refitted" if method.refit_norms or method.refit_final_norm else ""
        told.append(f"{where}: refit is {left.refit}{norms}: {family.no_sequence}")
    return told


def _told_of_ranks(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> str:
    settled = with_numbers(method, checkpoint, ratio, where)
    shape = LowRankTarget(target_of(settled, checkpoint, ratio, where)).shape()
    ranks = ", ".join(f"{rank_field(name)} {row[0]}" for name, row in shape.ranks.items())
    return f"{where}: at {ratio:g}, in every layer {ranks}; attention's other matrices stay whole"


def _told_of_groups(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> list[str]:
    """A sentence if rounds keep KV groups that would go in one: neurons have made up for them in smaller rounds."""
    settled = with_numbers(method, checkpoint, ratio, where)
    in_one = settled.model_copy(update={"steps": 1, "round_ratio": None})
    kept, fewer = (sum(local_shapes(it, checkpoint, ratio, where)[-1].units[KV_GROUPS]) for it in (settled, in_one))
    if kept <= fewer:
        return []
    split = settled.tensor_parallel
    what = "a group" if split == 1 else f"{split} groups"
    share = split * checkpoint.parameter_counts.units[KV_GROUPS] * checkpoint.num_layers / checkpoint.parameters
    return [
        f"{where}: rounds to {ratio:g} keep {kept} KV groups, where one round would keep {fewer}: they are small "
        f"beside {what} of every layer, {share:.1%} of the model; {_fewer_rounds(method)} would let groups go"
    ]


def _fewer_rounds(method: Method) -> str:
    return "fewer steps" if method.round_ratio is None else "a larger prune.round_ratio"


def _of_all_rounds(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> Hashable:
    """The numbers that decide what stays in each round to a ratio."""
    rounds = round_ratios(method, ratio)
    if method.allocation == "plain":
        return tuple(map(tuple, plain_shapes_of_rounds(method, checkpoint, ratio, where)))
    if method.allocation == "local" and not checkpoint.family.experts:
        shapes = local_shapes(method, checkpoint, ratio, where)
        decided: list[Hashable] = [tuple(shape.units.values()) for shape in shapes]
    else:
        last = _deciding_numbers(checkpoint, ratio, method, where)  # reports a ratio that is out of reach as such
        decided = [*(_deciding_numbers(checkpoint, it, method, where) for it in rounds[:-1]), last]
    for (before, then), (earlier, later) in zip(pairwise(rounds), pairwise(decided), strict=True):
        if earlier == later:
            what, step, finer = _rounded(checkpoint, method)
            raise UserError(
                f"{where}: of {len(rounds)} rounds to ratio {ratio:g}, the one from {before:g} to {then:g} removes "
                f"nothing once {what} are rounded{to_multiples_of(step)}; use {_fewer_rounds(method)} or another ratio"
                f"{finer and f' or {finer}'}"
            )
    return tuple(decided)


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


def _splits(checkpoint: Checkpoint, ratio: float, method: Method, tensor_parallel: int, where: str) -> bool:
    """Whether the method reaches a ratio with this ``tensor_parallel``."""
    split = method.model_copy(update={"tensor_parallel": tensor_parallel})
    try:
        check_ratios(checkpoint, [ratio], split, where)
    except UserError:
        return False
    return True
