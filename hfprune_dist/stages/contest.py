"""Which units a model loses where those of all layers, of one or more kinds, compete by their scores."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.allocation import Ladder, allocate_globally, relative_to_mean, standardized
from hfprune_dist.core.width_search import Counts, ReweightedShapes
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.methods import CRITERIA
from hfprune_dist.planning.target import Target
from hfprune_dist.refit.cheap_fits import Scored
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Shape


@dataclass(frozen=True)
class Contest:
    """Units of the layers that stay, of one or more kinds, which compete to stay.

    Attributes:
        kinds: their kinds, neurons first.
        ladders: for each kind, one for each layer that stays.
        removals: parameters that the ladders are to lose; negative if the layers that went had more than the budget.
    """

    checkpoint: Checkpoint
    kinds: Sequence[str]
    ladders: Sequence[Sequence[Ladder]]
    removals: int

    @classmethod
    def among_all_layers(cls, params: PruneParameters, kinds: Sequence[Scored], target: Target) -> Contest:
        """The contest as long as all layers stay."""
        checkpoint = target.dense
        per_unit = checkpoint.parameter_counts.units
        ladders = []
        for scored, scores in zip(kinds, _comparable(params, checkpoint, kinds), strict=True):
            kind = scored.units.kind
            multiple_of = params.multiple_of if kind == NEURONS else params.tensor_parallel
            rungs = zip(scores, target.fewest(kind), strict=True)
            ladders.append([Ladder(layer, *rung, per_unit[kind], multiple_of) for layer, rung in enumerate(rungs)])
        # Of neurons alone, a whole number goes.
        smallest = per_unit[NEURONS] if len(kinds) == 1 and not target.droppable else 1
        names = [scored.units.kind for scored in kinds]
        return cls(checkpoint, names, ladders, round(target.removals / smallest) * smallest)

    def without(self, gone: Collection[int]) -> Contest:
        """The same contest once some layers are gone, whose parameters count as removed."""
        ladders = [[ladder for ladder in of_kind if ladder.layer not in gone] for of_kind in self.ladders]
        of_layers = self.checkpoint.parameter_counts.layers
        return Contest(self.checkpoint, self.kinds, ladders, self.removals - sum(of_layers[layer] for layer in gone))

    @property
    def layers(self) -> tuple[int, ...]:
        """Numbers of the layers that stay."""
        return tuple(ladder.layer for ladder in self.neurons)

    @property
    def neurons(self) -> Sequence[Ladder]:
        return self.ladders[0]

    @property
    def others(self) -> Sequence[Ladder]:
        """Ladders of the kinds other than neurons."""
        return [ladder for of_kind in self.ladders[1:] for ladder in of_kind]

    @property
    def removable(self) -> int:
        """The most parameters that can go."""
        return sum((each.most - each.least) * each.parameters for of_kind in self.ladders for each in of_kind)

    def decided_by_scores(self, exchange: float) -> Shape:
        """The shape that loses where scores are lowest; those of other kinds than neurons count ``exchange`` times."""
        dearer = [ladder.dearer(exchange) for ladder in self.others]
        return self.shape(allocate_globally([*self.neurons, *dearer], self.removals))

    def reweighted(self) -> ReweightedShapes:
        """The family of shapes to search."""
        return ReweightedShapes(self.neurons, self.others, self.removals)

    def allows(self, counts: Counts) -> bool:
        """Whether every layer has that many units, and none would keep fewer than it must."""
        ladders = [*self.neurons, *self.others]
        return all(each.least <= count <= each.most for count, each in zip(counts, ladders, strict=True))

    def shape(self, counts: Sequence[int]) -> Shape:
        """The shape that keeps these numbers of units, given in the order of the ladders."""
        size = len(self.layers)
        rows = [tuple(counts[start : start + size]) for start in range(0, len(counts), size)]
        return Shape(self.layers, dict(zip(self.kinds, rows, strict=True)))


def _comparable(params: PruneParameters, checkpoint: Checkpoint, kinds: Sequence[Scored]) -> list[Sequence[Tensor]]:
    """Non-negative scores of each kind on one scale for all layers and kinds; what competes is a score divided by the
    number of its unit's parameters.
    """
    criterion = CRITERIA[params.criterion]
    of_kinds: list[Sequence[Tensor]] = [scored.scores for scored in kinds]
    if params.allocation == "standardized":  # a unit's score, whatever its size, shifted so that the smallest is 0
        of_kinds = [standardized(scores, in_deviations=criterion.in_deviations) for scores in of_kinds]
        smallest = min(float(scores_U.min()) for scores in of_kinds for scores_U in scores)
        of_kinds = [[scores_U - smallest for scores_U in scores] for scores in of_kinds]
    elif criterion.in_nats:
        return of_kinds
    else:  # on average, a parameter counts the same in every kind and layer
        of_kinds = [relative_to_mean(scores) for scores in of_kinds]
    per_unit = checkpoint.parameter_counts.units
    sizes = [per_unit[scored.units.kind] / per_unit[NEURONS] for scored in kinds]
    return [[scores_U * size for scores_U in scores] for size, scores in zip(sizes, of_kinds, strict=True)]
