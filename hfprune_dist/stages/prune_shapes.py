"""What stays by score: in a shape that the ratio decides, or in one for which kinds of units and all layers compete.

Layers that may go are first ordered by how little the model misses them. Shapes that drop none or some of them, with
the units that scores ask for, are compared: with a cheap refit, then the best of them fitted layer by layer, on windows
that nothing in the stage has been fitted to or measured on. The search continues with as many layers as the closest
shape has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.allocation import EXCHANGE, allocate_globally
from hfprune_dist.core.width_search import MEASUREMENTS, START, Counts, search_shapes
from hfprune_dist.planning.shapes import numbers_of_groups, shape_for, with_layers
from hfprune_dist.planning.target import Target
from hfprune_dist.refit.candidates import Scored, kept_of
from hfprune_dist.refit.measurement import Candidate, Measurement
from hfprune_dist.stages.contest import Contest, candidate_of
from hfprune_dist.stages.prune_refit import Context, pruned_kinds
from hfprune_dist.stages.shape_search import FINALISTS, ShapeSearch, may_be_closest
from hfprune_dist.structures import KV_GROUPS, LAYERS, NEURONS
from hfprune_dist.structures.kept import Kept


def decide_shape(
    context: Context, checkpoint: Checkpoint, scores: Mapping[str, Sequence[Tensor]]
) -> tuple[Kept, dict[str, Any]]:
    """What stays, and metrics of the search if there was one.

    Args:
        scores: kind -> scores of each layer's units.
    """
    allocation = context.params.allocation
    kinds = [Scored(units, scores[units.kind]) for units in pruned_kinds(context, checkpoint)]
    target = Target.of(checkpoint, context.params, context.params.ratio, context.stage.label)
    if not target.competes:
        return kept_of(kinds, candidate_of(kinds, shape_for(target))), {}
    contest = Contest.of(context.params, checkpoint, kinds, target)
    if allocation in ("global", "standardized"):
        rate = EXCHANGE if allocation == "global" else 1.0
        others = [ladder.dearer(rate) for ladder in contest.others]
        counts = allocate_globally([*contest.neurons, *others], contest.removals)
        return kept_of(kinds, contest.candidate(counts)), {}
    found, metrics = _Search(context, checkpoint, kinds, contest).run()
    return kept_of(kinds, found), metrics


class _Search:
    """Candidate shapes, and how far from the dense model a cheap refit leaves each of them.

    Args:
        contest: the one in which all layers stay.
    """

    def __init__(self, context: Context, checkpoint: Checkpoint, kinds: Sequence[Scored], contest: Contest) -> None:
        self._context = context
        self._checkpoint = checkpoint
        self._kinds = kinds
        self._contest = contest
        self._shapes = ShapeSearch(context, checkpoint, kinds, has_finals=LAYERS in context.params.structures)

    def run(self) -> tuple[Candidate, dict[str, Any]]:
        """The shape that was measured to be closest, and metrics."""
        target = self._contest.target
        order = self._shapes.layers_in_order(target.droppable, target.most_layers_gone())
        contests = self._contests(order)
        measurement = self._shapes.measurement(
            "search",
            refit=self._context.params.refit != "none",
            measurements=MEASUREMENTS + (len(contests) > 1),
        )
        best, metrics = self._number_of_layers(contests, measurement)
        found = search_shapes(
            best.reweighted(),
            self._plain(best),
            lambda many: measurement.kl([best.candidate(counts) for counts in many]),
        )
        metrics |= {"layers_in_order_of_dropping": [*order]} if order else {}
        return best.candidate(found.counts), metrics | {"search_kl": metrics.get("search_kl", {}) | found.candidates}

    def _contests(self, order: Sequence[int]) -> dict[str, Contest]:
        """Name -> contest, one for each number of layers to try; the most layers first."""
        numbers = range(0, len(order) + 1, self._contest.target.step_of_layers)
        contests = _possible([self._contest.without(order[:gone]) for gone in numbers])
        contests = contests or [self._contest.without(order)]  # if steps skip the fewest layers
        return {f"{len(it.layers)} layers": it for it in contests}

    def _number_of_layers(
        self, contests: Mapping[str, Contest], measurement: Measurement
    ) -> tuple[Contest, dict[str, Any]]:
        """The contest whose shape, with the units that scores ask for, is the closest, and metrics."""
        first, *others = contests
        if not others:
            return contests[first], {}
        candidates = {name: it.candidate(it.reweighted().counts(START)) for name, it in contests.items()}
        kls = dict(zip(contests, measurement.kl([*candidates.values()]), strict=True))
        competing = may_be_closest(kls)
        if self._context.params.refit == "none":
            return contests[competing[0]], {"search_kl": kls}

        def with_fewer_layers(closest: str) -> str | None:
            fewer = [it for it in competing if len(contests[it].layers) < len(contests[closest].layers)]
            return max(fewer, key=lambda it: len(contests[it].layers), default=None)

        best = self._shapes.closest(
            competing[:FINALISTS],
            lambda name: self._context.world.broadcast(kept_of(self._kinds, candidates[name])),
            with_fewer_layers,
        )
        compared = self._shapes.finalists_kl
        return contests[best], {"search_kl": kls} | ({"finalists_kl": compared} if compared else {})

    def _plain(self, contest: Contest) -> dict[str, Counts]:
        """Name -> shape that is the same in all layers of a contest, for those that the contest allows."""
        target = contest.target
        if not self._checkpoint.is_uniform:
            return {}
        shapes = (with_layers(target, contest.layers, groups) for groups in numbers_of_groups(target))
        plain = {
            f"{it.units[KV_GROUPS][0]} KV groups, width {it.units[NEURONS][0]} everywhere": tuple(
                count for scored in contest.kinds for count in it.units[scored.units.kind]
            )
            for it in shapes
            if it is not None
        }
        return {name: counts for name, counts in plain.items() if contest.allows(counts)}


def _possible(contests: Sequence[Contest]) -> list[Contest]:
    """The contests whose units can make up the ratio; if dropped layers always exceed it, the one with most layers.

    Args:
        contests: those with most layers first.
    """
    enough = [it for it in contests if it.removals <= it.removable]
    return [it for it in enough if it.removals >= 0] or enough[:1]
