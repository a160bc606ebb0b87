"""A method's settings as numbers for one model: what widths are multiples of, and how many layers lose nothing.

Multiples are sizes that run fast on hardware, if that costs few parameters, and that can be split over devices.
"""

from __future__ import annotations

from dataclasses import replace

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.errors import UserError
from hfprune_dist.planning.budget import budget_of
from hfprune_dist.planning.legality import suited
from hfprune_dist.planning.plain_shapes import all_plain_shapes, ratio_of
from hfprune_dist.planning.shape_target import divisible, target_of
from hfprune_dist.planning.shapes import shapes_for
from hfprune_dist.structures import EXPERTS

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
    fitting = (it for it in tried if _suits(it, method, checkpoint, ratio, where))
    return next(fitting, LEAST if checkpoint.units.width >= WIDE else 1)


def _suits(multiple_of: int, method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> bool:
    """Whether every shape that competes reaches the ratio with the multiple, and goes little beyond it."""
    finest = target_of(method.model_copy(update={"multiple_of": 1}), checkpoint, ratio, where)
    target = replace(finest, multiple_of=multiple_of)
    try:
        check_multiple(checkpoint, method.model_copy(update={"multiple_of": multiple_of}), where)
        if method.allocation in ("global", "standardized", "searched"):
            budget_of(target, method.limits())  # floors are rounded up to the multiple
        elif method.allocation != "plain":
            (reached,) = map(target.counts.ratio, shapes_for(target, method))
            return ratio <= reached <= ratio + MOST_BEYOND
    except UserError:
        return False
    shapes = all_plain_shapes(target)
    as_many = len(shapes) == len(all_plain_shapes(finest)) > 0
    return as_many and all(ratio_of(target, shape) <= ratio + MOST_BEYOND for shape in shapes)


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
