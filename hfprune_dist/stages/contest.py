"""The contest between units, of one or more kinds in the layers that stay, over which of them a model loses."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.allocation import Ladder, layer_mean_one, standardized
from hfprune_dist.core.width_search import Counts, ReweightedShapes
from hfprune_dist.kinds.prune import PruneParameters
from hfprune_dist.methods import CRITERIA
from hfprune_dist.planning.target import Target
from hfprune_dist.refit.candidates import Scored
from hfprune_dist.refit.measurement import Candidate
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Shape


@dataclass(frozen=True)
class Contest:
    """The ladders of all kinds of units, and how many parameters they are to lose.

    Attributes:
        kinds: the units of each kind with their scores, neurons first.
        target: the ratio asked for, and the bounds on what may go.
        ladders: for each kind, one for each layer that stays.
        removals: parameters that the ladders are to lose; negative if the layers that went had more than the budget.
    """

    checkpoint: Checkpoint
    kinds: Sequence[Scored]
    target: Target
    ladders: Sequence[Sequence[Ladder]]
    removals: int

    @classmethod
    def of(cls, params: PruneParameters, checkpoint: Checkpoint, kinds: Sequence[Scored], target: Target) -> Contest:
        """The contest in which all layers stay."""
        comparable = _comparable(params, checkpoint, kinds)
        ladders = [_ladders(params, checkpoint, scored, target) for scored in comparable]
        # Of neurons alone, a whole number goes.
        smallest = target.counts.units[NEURONS] if len(kinds) == 1 and not target.droppable else 1
        return cls(checkpoint, kinds, target, ladders, round(target.removals / smallest) * smallest)

    def without(self, gone: Collection[int]) -> Contest:
        """The same contest once some layers are gone, whose parameters count as removed."""
        ladders = [[ladder for ladder in of_kind if ladder.layer not in gone] for of_kind in self.ladders]
        of_layers = self.checkpoint.parameter_counts.layers
        return replace(self, ladders=ladders, removals=self.removals - sum(of_layers[layer] for layer in gone))

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
        return sum((it.most - it.least) * it.parameters for it in [*self.neurons, *self.others])

    def reweighted(self) -> ReweightedShapes:
        """The family of shapes to search."""
        return ReweightedShapes(self.neurons, self.others, self.removals)

    def allows(self, counts: Counts) -> bool:
        """Whether every layer has that many units, and none would keep fewer than it must."""
        return all(
            it.least <= count <= it.most for count, it in zip(counts, [*self.neurons, *self.others], strict=True)
        )

    def candidate(self, counts: Sequence[int]) -> Candidate:
        """The candidate that keeps these numbers of units, given in the order of the ladders."""
        size = len(self.layers)
        of_kinds = [counts[start : start + size] for start in range(0, len(counts), size)]
        choices = dict(zip(self.layers, zip(*of_kinds, strict=True), strict=True))
        return tuple(choices.get(layer) for layer in range(self.checkpoint.num_layers))


def candidate_of(kinds: Sequence[Scored], shape: Shape) -> Candidate:
    """The candidate with a shape.

    Args:
        kinds: in the order of a choice's numbers.
    """
    rows = [shape.units[it.units.kind] for it in kinds]
    choices = dict(zip(shape.layers, zip(*rows, strict=True), strict=True))
    return tuple(choices.get(layer) for layer in range(kinds[0].units.num_layers))


def _comparable(params: PruneParameters, checkpoint: Checkpoint, kinds: Sequence[Scored]) -> list[Scored]:
    """The same kinds with non-negative scores on one scale for all layers and kinds; what competes is a score divided
    by the number of its unit's parameters.
    """
    criterion = CRITERIA[params.criterion]
    if params.allocation == "standardized":  # a unit's score, whatever its size, shifted so that the smallest is 0
        of_kinds = [standardized(it.scores, in_deviations=criterion.in_deviations) for it in kinds]
        smallest = min(float(scores_U.min()) for scores in of_kinds for scores_U in scores)
        of_kinds = [[scores_U - smallest for scores_U in scores] for scores in of_kinds]
    elif criterion.in_nats:
        return list(kinds)
    else:  # on average, a parameter counts the same in every kind and layer
        of_kinds = [layer_mean_one(it.scores) for it in kinds]
    per_unit = checkpoint.parameter_counts.units
    sizes = [per_unit[it.units.kind] / per_unit[NEURONS] for it in kinds]
    return [
        Scored(it.units, [scores_U * size for scores_U in scores])
        for it, scores, size in zip(kinds, of_kinds, sizes, strict=True)
    ]


def _ladders(params: PruneParameters, checkpoint: Checkpoint, scored: Scored, target: Target) -> list[Ladder]:
    kind, per_unit = scored.units.kind, checkpoint.parameter_counts.units
    multiple_of = params.multiple_of if kind == NEURONS else params.tensor_parallel
    return [
        Ladder(layer, scored.scores[layer], least, per_unit[kind], multiple_of)
        for layer, least in enumerate(target.fewest(kind))
    ]
