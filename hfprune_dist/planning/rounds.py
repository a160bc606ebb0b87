"""The rounds in which a method prunes on its way to a ratio."""

from __future__ import annotations

import math

from hfprune_dist.config.method import Method


def round_ratios(method: Method, ratio: float) -> list[float]:
    """Return the ratios that a method goes through, ascending, the last one being ``ratio`` itself.

    All are shares of the dense model's parameters. They are rounded to what a person would write, so that a third of
    0.3 is 0.1 and finds the artifact of that ratio.
    """
    size = method.round_ratio
    if size is None:
        earlier = [ratio * step / method.steps for step in range(1, method.steps)]
    else:
        earlier = [size * number for number in range(1, math.ceil(ratio / size) + 1)]
    rounded = [round(it, 12) for it in earlier]
    return [*(it for it in rounded if it < ratio), ratio]
