"""How many units each layer keeps when all layers, and kinds of units, compete for the same budget."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# How much dearer than neurons, by their nats, units of attention count: several that go together cost about twice what
# their scores add up to. On SmolLM2-135M (one-shot least squares, no search), KL at 20, 30, 40 and 50 % was .469, .946,
# 1.514 and 2.055 nats at a rate of 1; .464, .834, 1.228 and 1.838 at 2; .494, .849, unknown and 1.830 at 3.
EXCHANGE = 2.0


@dataclass(frozen=True)
class Ladder:
    """Units of one kind in one layer, which go by steps, cheapest first.

    Attributes:
        layer: its number.
        scores: of the units, float64 [units], in a unit of measure that all ladders share.
        fewest: units below which the layer doesn't go.
        parameters: of one unit.
        multiple_of: numbers of units that are left once some are gone are multiples of it.
    """

    layer: int
    scores: Tensor
    fewest: int
    parameters: int = 1
    multiple_of: int = 1

    @property
    def most(self) -> int:
        """Units that there are."""
        return len(self.scores)

    @property
    def least(self) -> int:
        """The fewest units that steps lead to."""
        return min(-(-max(self.fewest, 1) // self.multiple_of) * self.multiple_of, self.most)

    def below(self, count: int) -> int:
        """Units that are left one step below ``count``; the same where there is none."""
        fewer = (count - 1) // self.multiple_of * self.multiple_of
        return fewer if fewer >= self.least else count

    def above(self, count: int) -> int:
        """Units that there are one step above ``count``; the same where there is none."""
        return min((count // self.multiple_of + 1) * self.multiple_of, self.most)

    def dearer(self, factor: float) -> Ladder:
        """The same with scores multiplied by ``factor``."""
        return replace(self, scores=self.scores * factor)


@dataclass(frozen=True)
class Step:
    """Units of ladder ``place`` that go together, at ``price`` a parameter. Steps of a ladder follow ``number``."""

    price: float
    layer: int
    place: int
    number: int
    left: int
    parameters: int


def allocate_globally(ladders: Sequence[Ladder], removals: int) -> list[int]:
    """Take away ``removals`` parameters where they score least, over all ladders together.

    Steps are taken in the order of their price until so many parameters are gone. If the last step went too far, as one
    of a large unit may, the last steps of the smallest units are taken back while that comes closer. So what is removed
    differs from what was asked by half of such a step, as long as there are any to take back.

    Returns:
        Units that each ladder keeps. Of equal prices, the lower layer gives first, then the earlier ladder.
    """
    finest = min(ladder.parameters for ladder in ladders)
    steps = [step for place, ladder in enumerate(ladders) for step in _steps(ladder, place, finest)]
    steps.sort(key=lambda step: (step.price, step.layer, step.place, step.number))
    left, taken = removals, 0
    while left > 0 and taken < len(steps):
        left -= steps[taken].parameters
        taken += 1
    small = [step for step in steps[:taken] if ladders[step.place].parameters == finest]
    while small and -2 * left > small[-1].parameters:
        left += small.pop().parameters
    large = (step for step in steps[:taken] if ladders[step.place].parameters != finest)
    return _counts(ladders, [*large, *small])


def layer_mean_one(scores: Sequence[Tensor]) -> list[Tensor]:
    """Scores divided by their layer's mean: makes layers comparable where the criterion's own unit doesn't."""
    return [scores_D / scores_D.mean().clamp(min=torch.finfo(torch.float64).tiny) for scores_D in scores]


def standardized(scores: Sequence[Tensor], *, in_deviations: bool) -> list[Tensor]:
    """Scores less their layer's mean, in its standard deviations (FLAP: An et al. 2023, arXiv 2312.11983, AL-AM).

    Args:
        in_deviations: whether they are in standard deviations already.
    """
    centred = [scores_U - scores_U.mean() for scores_U in scores]
    if in_deviations:
        return centred
    return [it / (float(it.std()) or 1.0) if len(it) > 1 else it for it in centred]


def _steps(ladder: Ladder, place: int, finest: int) -> list[Step]:
    """A ladder's steps from all units down; a step is never cheaper than the one that must come before it."""
    rising = ladder.scores.sort().values.tolist()
    count, price, weight = ladder.most, 0.0, ladder.parameters / finest
    steps: list[Step] = []
    while (fewer := ladder.below(count)) < count:
        gone = rising[ladder.most - count : ladder.most - fewer]
        price = max(price, sum(gone) / len(gone) / weight)
        steps.append(Step(price, ladder.layer, place, len(steps), fewer, len(gone) * ladder.parameters))
        count = fewer
    return steps


def _counts(ladders: Sequence[Ladder], taken: Iterable[Step]) -> list[int]:
    counts = [ladder.most for ladder in ladders]
    for step in taken:
        counts[step.place] = min(counts[step.place], step.left)
    return counts
