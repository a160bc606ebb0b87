"""How many units each layer keeps when all layers compete for the same budget."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Step:
    """One layer made narrower: ``size`` units go, at ``price`` a unit. Steps of a layer follow ``number``."""

    price: float
    layer: int
    number: int
    size: int


def allocate_globally(
    scores: Sequence[Tensor], removals: int, narrowest: Sequence[int], multiple_of: int = 1
) -> list[int]:
    """Take away ``removals`` units where they score least, over all layers together.

    Args:
        scores: of each layer's units, float64 [its units], in a unit of measure that layers share.
        removals: units to remove from the whole model; met as closely as ``multiple_of`` allows.
        narrowest: the width below which each layer doesn't go.
        multiple_of: widths of layers that lose units are multiples of it.

    Returns:
        Neurons that each layer keeps. Of equal prices, the lower layer gives first.
    """
    widths = [len(scores_D) for scores_D in scores]
    steps = [step for layer, _ in enumerate(scores) for step in _steps(scores, layer, narrowest[layer], multiple_of)]
    left = removals
    for step in sorted(steps, key=lambda step: (step.price, step.layer, step.number)):
        if left < (step.size + 1) // 2:  # stopping here is closer than going on
            break
        widths[step.layer] -= step.size
        left -= step.size
    return widths


def layer_mean_one(scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores divided by their layer's mean: makes layers comparable where the criterion's own unit doesn't."""
    return [scores_D / scores_D.mean().clamp(min=torch.finfo(torch.float64).tiny) for scores_D in scores]


def _steps(scores: Sequence[Tensor], layer: int, narrowest: int, multiple_of: int) -> list[Step]:
    """A layer's steps from its full width down; a step is never cheaper than the one that must come before it."""
    rising = scores[layer].sort().values.tolist()
    width, price = len(rising), 0.0
    steps: list[Step] = []
    while (narrower := (width - 1) // multiple_of * multiple_of) >= max(narrowest, 1):
        gone = rising[len(rising) - width : len(rising) - narrower]
        price = max(price, sum(gone) / len(gone))
        steps.append(Step(price, layer, len(steps), len(gone)))
        width = narrower
    return steps
