"""Allocation of one parameter budget among layers and kinds of units that compete for it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

# Factor on the scores of attention units, in nats, relative to neurons: removing several of them together costs about
# twice the sum of their scores. On SmolLM2-135M (one-shot least squares, no search), KL at 20, 30, 40 and 50 % was
# .469, .946, 1.514, 2.055 nats at a factor of 1; .464, .834, 1.228 and 1.838 at 2; .494, .849, unknown and 1.830 at 3.
EXCHANGE = 2.0


@dataclass(frozen=True)
class Ladder:
    """Units of one kind in one layer, which are removed in steps, cheapest first.

    Attributes:
        scores: scores of the units, float64 [units], none negative, in a unit of measure that all ladders share.
        fewest: lower bound on the number of units that stay.
        parameters: number of parameters of one unit.
        multiple_of: once any units are removed, the number that stays is a multiple of this.
    """

    layer: int
    scores: Tensor
    fewest: int
    parameters: int = 1
    multiple_of: int = 1

    @property
    def most(self) -> int:
        """Number of units before any are removed."""
        return len(self.scores)

    @property
    def least(self) -> int:
        """Number of units after the last step."""
        return min(-(-max(self.fewest, 1) // self.multiple_of) * self.multiple_of, self.most)

    def below(self, count: int) -> int:
        """Return the number of units one step below ``count``, or ``count`` if there is no such step."""
        fewer = (count - 1) // self.multiple_of * self.multiple_of
        return fewer if fewer >= self.least else count

    def above(self, count: int) -> int:
        """Return the number of units one step above ``count``, or ``count`` if there is no such step."""
        return min((count // self.multiple_of + 1) * self.multiple_of, self.most)

    def step_sizes(self) -> Tensor:
        """Return the number of units that each step removes, int64 [steps]."""
        sizes_S = torch.full((-(-(self.most - self.least) // self.multiple_of),), self.multiple_of)
        sizes_S[:1] = self.most - self.below(self.most)
        return sizes_S

    def after(self, steps: int) -> int:
        """Return the number of units that are left after so many steps."""
        return self.below(self.most) - (steps - 1) * self.multiple_of if steps else self.most

    def dearer(self, factor: float) -> Ladder:
        """Return the same ladder with its scores multiplied by ``factor``."""
        return replace(self, scores=self.scores * factor)


def allocate_globally(ladders: Sequence[Ladder], removals: int) -> list[int]:
    """Remove ``removals`` parameters where their scores are lowest, over all ladders together.

    Steps are taken in order of price until that many parameters are gone. The price is the mean score of a step's units
    divided by their size, where the smallest unit has size 1, but no lower than that of the step that must come before
    it. If the last step overshoots, as that of a large unit may, the latest steps of the smallest units are undone as
    long as this comes closer. The result then differs from ``removals`` by at most half of such a step, as long as
    there are steps to undo.

    Returns:
        Number of units that each ladder keeps. At equal prices, the lower layer loses first, then the earlier ladder.
    """
    finest = min(ladder.parameters for ladder in ladders)
    places = sorted(range(len(ladders)), key=lambda place: ladders[place].layer)
    sizes = [ladders[place].step_sizes() for place in places]
    prices = [_prices(ladders[place], sizes_S, finest) for place, sizes_S in zip(places, sizes, strict=True)]
    order_S = torch.cat(prices).sort(stable=True).indices
    places_S = torch.tensor(places).repeat_interleave(torch.tensor([len(sizes_S) for sizes_S in sizes]))[order_S]
    per_unit_S = torch.tensor([ladder.parameters for ladder in ladders])[places_S]
    parameters_S = torch.cat(sizes)[order_S] * per_unit_S
    gone_S = parameters_S.cumsum(0)
    taken = min(int(torch.searchsorted(gone_S, removals)) + 1, len(gone_S)) if removals > 0 else 0
    left = removals - int(parameters_S[:taken].sum())
    small_N = (per_unit_S == finest)[:taken].nonzero().flatten()
    undone = 0
    while undone < len(small_N) and -2 * left > (parameters := int(parameters_S[small_N[-1 - undone]])):
        left += parameters
        undone += 1
    stand_T = torch.ones(taken, dtype=torch.bool)
    stand_T[small_N[len(small_N) - undone :]] = False
    steps = places_S[:taken][stand_T].bincount(minlength=len(ladders)).tolist()
    return [ladder.after(count) for ladder, count in zip(ladders, steps, strict=True)]


def relative_to_mean(scores: Sequence[Tensor]) -> list[Tensor]:
    """Divide scores [units] by their layer's mean, so that layers compare whatever the criterion's unit of measure."""
    return [scores_D / scores_D.mean().clamp(min=torch.finfo(torch.float64).tiny) for scores_D in scores]


def standardized(scores: Sequence[Tensor], *, in_deviations: bool) -> list[Tensor]:
    """Standardize scores within their layer: (score - mean) / std (FLAP: An et al. 2023, arXiv 2312.11983, AL-AM); of
    those that are ``in_deviations`` already, only the mean is subtracted.
    """
    centred = [scores_U - scores_U.mean() for scores_U in scores]
    if in_deviations:
        return centred
    return [scores_U / (float(scores_U.std()) or 1.0) if len(scores_U) > 1 else scores_U for scores_U in centred]


def _prices(ladder: Ladder, sizes_S: Tensor, finest: int) -> Tensor:
    """Return the prices of a ladder's steps, float64 [steps], given the numbers of units that they remove."""
    rising_U = ladder.scores.double().cpu().sort().values
    last = int(sizes_S.sum())
    # Only the first step may have fewer units than others; zeros before them leave its sum as it is.
    padding = len(sizes_S) * ladder.multiple_of - last
    units_SM = torch.cat([rising_U.new_zeros(padding), rising_U[:last]]).view(len(sizes_S), ladder.multiple_of)
    total_S = rising_U.new_zeros(len(sizes_S))
    for units_S in units_SM.unbind(dim=1):  # one after another, so that the sum's bits don't depend on the machine
        total_S += units_S
    return (total_S / sizes_S / (ladder.parameters / finest)).clamp(min=0.0).cummax(0).values
