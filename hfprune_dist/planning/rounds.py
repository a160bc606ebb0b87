"""The rounds in which a method prunes on its way to a ratio."""

from __future__ import annotations

import math

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.method import Method
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.planning.multiples import protected_by, target_of
from hfprune_dist.structures.kept import Shape


def round_ratios(method: Method, ratio: float) -> list[float]:
    """The ratios that a method goes through, rising, the last one ``ratio`` itself.

    All are of the dense model's parameters. They are rounded to what a person would write, so that a third of 0.3 is
    0.1 and finds the artifact of that ratio.
    """
    size = method.round_ratio
    if size is None:
        earlier = [ratio * step / method.steps for step in range(1, method.steps)]
    else:
        earlier = [size * number for number in range(1, math.ceil(ratio / size) + 1)]
    rounded = [round(it, 12) for it in earlier]
    return [*(it for it in rounded if it < ratio), ratio]


def local_shapes(method: Method, checkpoint: Checkpoint, ratio: float, where: str) -> list[Shape]:
    """What each round of a method with ``allocation: local`` leaves on the way to a ratio, each within the one before.

    Args:
        method: with numbers, as ``with_numbers`` gives it.
        checkpoint: of the dense model.

    Raises:
        UserError: as ``LocalTarget.shape`` does.
    """
    shapes: list[Shape] = []
    for reached in round_ratios(method, ratio):
        asked = target_of(method, checkpoint, reached, where)
        before = shapes[-1] if shapes else None
        shapes.append(LocalTarget(asked, *protected_by(method), before).shape())
    return shapes
