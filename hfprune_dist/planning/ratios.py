"""Checks that a method can reach the given ratios on a model, and that they lead to different checkpoints."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.budget import budget_of
from hfprune_dist.planning.expert_shapes import mixture_target, refuse_unaligned
from hfprune_dist.planning.legality import can_do, refuse_model, suited, why_not
from hfprune_dist.planning.low_rank_shapes import LowRankTarget
from hfprune_dist.planning.multiples import check_multiple, with_numbers
from hfprune_dist.planning.shape_target import divisible, target_of
from hfprune_dist.planning.shapes import shapes_for
from hfprune_dist.planning.students import check_student
from hfprune_dist.planning.widths import to_multiples_of
from hfprune_dist.structures import EXPERTS, KV_GROUPS, NEURONS
from hfprune_dist.structures.low_rank import rank_field

# Architectures of which vLLM and SGLang take hidden_size / heads as the size of a head, whatever head_dim says.
_HEADS_SHARE_HIDDEN_SIZE = {"qwen2"}


def check_ratios(checkpoint: Checkpoint, ratios: Sequence[float], method: Method, where: str) -> None:
    """Refuse ratios that a method can't reach on a model, or that would lead to the same checkpoint.

    Raises:
        UserError: naming the largest ratio within reach, or two ratios that are the same; or if the model's layers
            differ and the method makes all of them alike.
    """
    method = suited(method, checkpoint)
    refuse_model(method, checkpoint, where)
    if checkpoint.family.experts:
        refuse_unaligned(checkpoint, where)
    if checkpoint.ranks:
        raise UserError(
            f"{where}: its attention has matrices of low rank ({', '.join(map(rank_field, checkpoint.ranks))} in "
            "config.json), so it has been pruned already; prune the model that it came from, at a larger ratio"
        )
    reached: dict[Hashable, float] = {}
    for ratio in ratios:
        settled = with_numbers(method, checkpoint, ratio, where)
        check_multiple(checkpoint, settled, where)
        _check_protected(checkpoint, settled, where)
        check_student(checkpoint, ratio, settled, where)
        decided = _deciding_numbers(checkpoint, ratio, settled, where)
        if decided in reached:
            what, step, finer = _what_is_rounded(checkpoint, settled)
            raise UserError(
                f"{where}: ratios {reached[decided]:g} and {ratio:g} would be the same checkpoint once {what} are "
                f"rounded{to_multiples_of(step)}; leave one of them out{finer and f' or use {finer}'}"
            )
        reached[decided] = ratio


def _deciding_numbers(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> Hashable:
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


def _what_is_rounded(checkpoint: Checkpoint, method: Method) -> tuple[str, int, str]:
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
    first, last = method.protected()
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
        return [f"{where}: left out, since the model {next(why_not(method, checkpoint))}"]
    told = _left_out(checkpoint, method, where)
    method = suited(method, checkpoint)
    if method.multiple_of == "auto":
        multiples = [(ratio, with_numbers(method, checkpoint, ratio, where).multiple_of) for ratio in ratios]
        told.append(f"{where}: multiple_of is {', '.join(f'{multiple} at {ratio:g}' for ratio, multiple in multiples)}")
    if checkpoint.family.model_type in _HEADS_SHARE_HIDDEN_SIZE and _may_be_plain_with_fewer_groups(method):
        told.append(
            f"{where}: where KV groups go, vLLM and SGLang can't load the checkpoint, as they compute the size of "
            f"{checkpoint.family.model_type}'s heads from their number; for them, leave kv_groups out of structures"
        )
    if method.allocation == "low_rank":
        told += [_told_of_ranks(checkpoint, ratio, method, where) for ratio in ratios]
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


def _may_be_plain_with_fewer_groups(method: Method) -> bool:
    return KV_GROUPS in method.structures and method.allocation in ("plain", "local")


def _left_out(checkpoint: Checkpoint, method: Method, where: str) -> list[str]:
    """What an adaptive method leaves out for this model, and why."""
    family, left = checkpoint.family, suited(method, checkpoint)
    told = [f"{where}: KV groups stay: {family.whole_groups}"] if left.structures != method.structures else []
    if left.refit != method.refit:
        norms = ", and no norm is refitted" if method.effort == "thorough" else ""
        told.append(f"{where}: refit is {left.refit}{norms}: {family.no_sequence}")
    return told


def _told_of_ranks(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> str:
    settled = with_numbers(method, checkpoint, ratio, where)
    shape = LowRankTarget(target_of(settled, checkpoint, ratio, where)).shape()
    ranks = ", ".join(f"{rank_field(name)} {row[0]}" for name, row in shape.ranks.items())
    return f"{where}: at {ratio:g}, in every layer {ranks}; attention's other matrices stay whole"


def _splits(checkpoint: Checkpoint, ratio: float, method: Method, tensor_parallel: int, where: str) -> bool:
    """Whether the method reaches a ratio with this ``tensor_parallel``."""
    split = method.model_copy(update={"tensor_parallel": tensor_parallel})
    try:
        check_ratios(checkpoint, [ratio], split, where)
    except UserError:
        return False
    return True
