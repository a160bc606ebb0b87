"""What a method comes to on a model: its settings as numbers, and which ratios can be reached."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.methods.sdmprune import LACKS, lacking
from hfprune_dist.planning.methods import refuse_model, suited
from hfprune_dist.planning.shapes import plain_shapes, shapes_for
from hfprune_dist.planning.target import Target
from hfprune_dist.structures import EXPERTS
from hfprune_dist.structures.kept import Shape
from hfprune_dist.structures.low_rank import rank_field

# What ``multiple_of: auto`` tries, in this order: sizes that run fast on hardware, if that costs few parameters.
MULTIPLES = (256, 128, 64, 32)
# The share of all parameters that may be removed beyond the ratio.
MOST_BEYOND = 0.0125
# From width WIDE on, every multiple is at least LEAST.
WIDE, LEAST = 1024, 32


def place_of(model: str, method: str) -> str:
    """Name a model and a method, for messages."""
    return f"model {model!r}, method {method!r}"


def with_numbers(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> Method:
    """The method as it suits the model, with numbers for ``multiple_of`` and the protected layers; if KV groups may go,
    ``tensor_parallel`` divides ``multiple_of``.

    Raises:
        UserError: if ``tensor_parallel`` divides no number of KV groups.
    """
    method = suited(method, checkpoint)
    given = {"protect_first": method.protect_first, "protect_last": method.protect_last}
    numbers = {name: round(it * checkpoint.num_layers) if isinstance(it, float) else it for name, it in given.items()}
    method = method.model_copy(update=numbers)
    multiple_of = method.multiple_of
    if multiple_of == "auto":
        multiple_of = _what_auto_is(method, checkpoint, ratio, where)
    return method.model_copy(update={"multiple_of": math.lcm(multiple_of, method.split)})


def _what_auto_is(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> int:
    """The largest multiple with which every shape that competes removes at least the ratio, and little more; of experts
    1. If layers compete, plain shapes must be possible too, since these are measured beside others.
    """
    if EXPERTS in method.structures:
        return 1
    finest = Target.of(checkpoint, method.model_copy(update={"multiple_of": 1}), ratio, where)

    def shapes(multiple_of: int) -> list[Shape]:
        target = replace(finest, multiple_of=math.lcm(multiple_of, method.split))
        try:
            decided = [] if target.allocation == "plain" else shapes_for(target)
            return decided or plain_shapes(target)
        except UserError:
            return []

    most, ratio_of = len(shapes(1)), checkpoint.parameter_counts.ratio
    for multiple_of in MULTIPLES:
        found = shapes(multiple_of)
        if len(found) == most > 0 and all(ratio - 1e-9 <= ratio_of(it) <= ratio + MOST_BEYOND for it in found):
            return multiple_of
    return LEAST if checkpoint.units.width >= WIDE else 1


def check_ratios(checkpoint: Checkpoint, ratios: Iterable[float], method: Method, where: str) -> None:
    """Refuse ratios that a method can't reach on a model.

    Raises:
        UserError: naming the nearest ratio that it reaches; or what of the model the method can't prune.
    """
    method = suited(method, checkpoint)
    refuse_model(method, checkpoint, where)
    if checkpoint.ranks:
        raise UserError(
            f"{where}: its attention has matrices of low rank ({', '.join(map(rank_field, checkpoint.ranks))} in "
            "config.json), so it has been pruned already; prune the model that it came from, at a larger ratio"
        )
    for ratio in ratios:
        shapes_for(Target.of(checkpoint, with_numbers(method, checkpoint, ratio, where), ratio, where))
        _check_student(checkpoint, ratio, method, where)


def _check_student(checkpoint: Checkpoint, ratio: float, method: Method, where: str) -> None:
    """Refuse a ratio at which some neurons without a score would stay: those that the student lacks."""
    if method.student_chosen_by is None:
        return
    lacks = sum(lacking(count, LACKS) for count in checkpoint.units.counts)
    least = lacks * checkpoint.parameters_per_unit / checkpoint.parameters
    if ratio < least:
        raise UserError(
            f"{where}: ratio {ratio:g} removes less than the student of {method.criterion} lacks, which is "
            f"{least:.4f} of all parameters; use a larger ratio"
        )
