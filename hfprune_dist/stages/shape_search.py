"""What stays by score: in a shape that the ratio decides, that scores decide, or that is found by measuring candidates.

``plain`` shapes are the same in all layers; in others, kinds of units and all layers compete for one budget. A search
first orders the layers that may go by how little the model misses them. Candidates that drop none or some of them are
measured with a cheap refit; unless the effort is quick, the best of them are then fitted layer by layer. No shape is
measured on windows that its refit was fitted to, and those finalists are compared on windows that no fit or measurement
before has seen; the last refit then sees all. Fitting layer by layer makes up for more where layers are gone, which
cheap refits can't show. So the best finalist is tried with fewer layers as well, as long as that helps. Where layers
compete, the search for widths continues with as many layers as it has.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from hfprune_dist.core.allocation import EXCHANGE
from hfprune_dist.core.width_search import START, Counts, drop_order, search_shapes
from hfprune_dist.distributed.sums import is_held_out
from hfprune_dist.kinds.memory import Passes
from hfprune_dist.planning.shapes import name_of_plain, numbers_of_groups, shape_for, shapes_for, with_layers
from hfprune_dist.planning.target import Target
from hfprune_dist.refit.cheap_fits import Scored, kept_of
from hfprune_dist.refit.measurement import (
    PrunedLayers,
    held_out_windows,
    mean_divergences,
    measure_shapes,
)
from hfprune_dist.stages.contest import Contest
from hfprune_dist.stages.prune_refit import Context, dense_states, refit_layers, stream_of
from hfprune_dist.structures import KV_GROUPS, LAYERS, NEURONS
from hfprune_dist.structures.kept import Kept, Shape

# Windows for comparing candidates and for ordering layers, from those that refits hold out to choose their ridge.
# Ordering needs fewer, since layers differ a lot, and takes the most candidates. If quick, it reads only so many tokens
# of each, and cheap refits see one half of the windows.
WINDOWS, WINDOWS_OF_ORDER, QUICK_TOKENS = 8, 2, 64
# Layers that are measured again after each that goes, unless quick. Of ten removed from a small model, each was among
# these five.
CONTENDERS = 5
EVERY = 2  # candidates are compared on every second token
# One micro-batch of windows in this many is kept apart from the rest of the search, to compare finalists.
JUDGED_EVERY = 16
# How many of the shapes that cheap refits leave closest to the dense model are finalists.
FINALISTS = 2
# Shapes that cheap refits leave with more than this many times the least divergence aren't finalists. Better refits
# reversed the order of a small model's shapes where that factor was 1.06 or 1.14, not where it was 1.30, 1.42 or 1.51.
WORST_FINALIST = 1.25
# If quick, the shape with the fewest layers is taken among those with up to this many times the least divergence. On a
# model of 30 layers that lost half, 26 and 22 came to 1.02 and 1.04 after cheap refits, to 0.86 and 0.82 after others.
NEAR = 1.07


def decide_shape(
    context: Context, target: Target, scores: Mapping[str, Sequence[Tensor]]
) -> tuple[Kept, dict[str, Any]]:
    """What stays of the target's model, and metrics of the search if there was one.

    Args:
        scores: kind -> scores of each layer's units.
    """
    params, checkpoint = context.params, target.dense
    kinds = [Scored(units, scores[units.kind]) for units in checkpoint.pruned_kinds(params.structures)]
    metrics: dict[str, Any] = {}
    if params.allocation == "plain":
        found, metrics = _Search(context, kinds, target).plain_shape()
    elif params.allocation == "searched":
        contest = Contest.among_all_layers(params, kinds, target)
        found, metrics = _Search(context, kinds, target).any_shape(contest)
    elif target.competes:
        exchange = EXCHANGE if params.allocation == "global" else 1.0
        found = Contest.among_all_layers(params, kinds, target).decided_by_scores(exchange)
    else:
        found = shape_for(target)
    return kept_of(kinds, found), metrics


class _Search:
    """Candidates, and how far from the dense model refits leave each of them.

    Args:
        kinds: the units that may go, with their scores.
    """

    def __init__(self, context: Context, kinds: Sequence[Scored], target: Target) -> None:
        self._context = context
        self._checkpoint = target.dense
        self._kinds = kinds
        self._target = target
        self._refits = context.params.refit != "none"
        self._step = target.step_of_layers * (1 if context.params.is_thorough else 2)
        windows_ST, (_, size) = context.calibration_windows(), context.params.forward_pass()
        batches = windows_ST.split(size)
        apart = max(1, len(batches) // JUDGED_EVERY)
        has_finals = context.params.allocation == "plain" or LAYERS in context.params.structures
        if context.params.is_thorough and has_finals and len(batches) > 1:
            self._seen_ST, self._judged_ST = torch.cat(batches[:-apart]), torch.cat(batches[-apart:])
        else:  # a single micro-batch is both seen and judged
            self._seen_ST = self._judged_ST = windows_ST
        # Windows for cheap refits, which hold some of them out.
        skipped = 0 if context.params.is_thorough else max(0, min(len(batches) // 2, len(batches) - 2))
        self._fitted_ST = self._seen_ST[skipped * size :]
        self._compared_ST = held_out_windows(self._fitted_ST, size, WINDOWS)[:WINDOWS]
        # What the dense model's head reads; one pass through its layers, which is collective, serves all measurements.
        self._dense = cache(partial(dense_states, context, target.dense, self._compared_ST, Passes(1)))

    def plain_shape(self) -> tuple[Shape, dict[str, Any]]:
        """Of the shapes that are the same in all layers, the one that is measured to be closest, and metrics.

        Finalists are that which prunes only MLPs, and the best others.
        """
        num_layers, planned = self._checkpoint.num_layers, shapes_for(self._target)
        if not self._context.params.is_thorough:  # half of the KV groups or fewer cost too much
            most = self._target.groups.most
            planned = [shape for shape in planned if 2 * shape.units[KV_GROUPS][0] > most] or planned
        planned = [shape for shape in planned if (num_layers - len(shape.layers)) % self._step == 0] or planned
        order = self._layers_in_order(num_layers - min(len(shape.layers) for shape in planned))
        shapes, as_planned = [], []
        for shape in planned:
            gone = order[: num_layers - len(shape.layers)]
            layers = tuple(layer for layer in range(num_layers) if layer not in gone)
            as_planned.append(replace(shape, layers=layers))
            if (nearest := with_layers(self._target, layers, shape.units[KV_GROUPS][0])) is not None:
                shapes.append(nearest)
        named = {name_of_plain(shape): shape for shape in shapes or as_planned}
        kls = dict(zip(named, self._kl([*named.values()], "shapes"), strict=True))
        groups = {name: shape.units[KV_GROUPS][0] for name, shape in named.items()}
        most = self._target.groups.most
        mlp_alone = {name for name, shape in named.items() if (len(shape.layers), groups[name]) == (num_layers, most)}
        best, finalists = self._best(named, kls, groups, mlp_alone)
        return named[best], {"layers_in_order_of_dropping": order, "search_kl": kls, **finalists}

    def any_shape(self, contest: Contest) -> tuple[Shape, dict[str, Any]]:
        """The shape that is measured to be closest, and metrics.

        Args:
            contest: the one in which all layers stay.
        """
        order = self._layers_in_order(self._target.most_layers_gone())
        steps = range(0, len(order) + 1, self._step)
        contests = [contest.without(order[:gone]) for gone in steps]
        # Those whose units can make up the ratio; if the layers that are gone always exceed it, the one with most.
        enough = [each for each in contests if each.removals <= each.removable]
        contests = [each for each in enough if each.removals >= 0] or enough[:1] or [contest.without(order)]
        kls: dict[str, float] = {}
        known: dict[Counts, float] = {}
        metrics: dict[str, Any] = {"layers_in_order_of_dropping": order} if order else {}
        if len(contests) > 1:
            named = {f"{len(each.layers)} layers": each for each in contests}
            shapes = {name: each.shape(each.reweighted().counts(START)) for name, each in named.items()}
            kls = dict(zip(named, self._kl([*shapes.values()]), strict=True))
            best, finalists = self._best(shapes, kls, dict.fromkeys(named, 0))
            contests, metrics = [named[best]], metrics | finalists
            known[named[best].reweighted().counts(START)] = kls[best]
        contest = contests[0]

        def kl_of(many: Sequence[Counts]) -> list[float]:
            if unknown := [counts for counts in many if counts not in known]:
                known.update(zip(unknown, self._kl([contest.shape(counts) for counts in unknown]), strict=True))
            return [known[counts] for counts in many]

        counts, measured = search_shapes(contest.reweighted(), self._plain_within(contest), kl_of)
        return contest.shape(counts), metrics | {"search_kl": kls | measured}

    def _plain_within(self, contest: Contest) -> dict[str, Counts]:
        """Name -> shape that is the same in all layers of a contest, for those that the contest allows."""
        found: dict[str, Counts] = {}
        for groups in numbers_of_groups(self._target) if self._checkpoint.is_uniform else ():
            shape = with_layers(self._target, contest.layers, groups)
            if shape is not None:
                name = f"{shape.units[KV_GROUPS][0]} KV groups, width {shape.units[NEURONS][0]} everywhere"
                found[name] = tuple(count for scored in self._kinds for count in shape.units[scored.units.kind])
        return {name: counts for name, counts in found.items() if contest.allows(counts)}

    def _kl(self, shapes: Sequence[Shape], phase: str = "search", ordered_ST: Tensor | None = None) -> list[float]:
        """The divergence of each shape from the dense model, after a cheap refit if the stage refits at all.

        Args:
            phase: its name in progress reports.
            ordered_ST: windows that order layers; they are few, and nothing is refitted.
        """
        context, checkpoint, fitted_on = self._context, self._checkpoint, None
        if self._refits and ordered_ST is None:
            fitted_on = stream_of(context, checkpoint, self._fitted_ST)
            for index in [index for index in fitted_on.states if is_held_out(index, fitted_on.micro_batches)]:
                del fitted_on.states[index]  # cheap fits choose no ridge
        stream = stream_of(context, checkpoint, self._compared_ST if ordered_ST is None else ordered_ST, Passes(1))
        after_each = context.reporting(phase, checkpoint.num_layers)
        return measure_shapes(shapes, self._kinds, fitted_on, stream, self._dense(), after_each, every=EVERY)

    def _layers_in_order(self, count: int) -> list[int]:
        """The ``count`` droppable layers that the model misses least, in the order in which they go."""
        is_thorough, context = self._context.params.is_thorough, self._context
        ordered_ST = self._compared_ST[:WINDOWS_OF_ORDER, : None if is_thorough else QUICK_TOKENS]

        def without(gone: Collection[int]) -> Shape:
            layers = tuple(layer for layer in range(self._checkpoint.num_layers) if layer not in gone)
            counts = {scored.units.kind: scored.units.counts for scored in self._kinds}
            return Shape(layers, {kind: tuple(row[layer] for layer in layers) for kind, row in counts.items()})

        def measure(sets: Sequence[tuple[int, ...]]) -> Sequence[float]:
            phase = f"layers, {len(sets[0]) - 1} gone"
            given = [context.params.dtype, context.world.size, ordered_ST.tolist(), sets]  # whatever the ratio
            return context.once("order", given, lambda: self._kl([*map(without, sets)], phase, ordered_ST))

        return drop_order(self._target.droppable, count, measure, CONTENDERS if is_thorough else 0)

    def _best(
        self,
        shapes: Mapping[str, Shape],
        kls: Mapping[str, float],
        families: Mapping[str, int],
        always: Collection[str] = (),
    ) -> tuple[str, dict[str, Any]]:
        """The shape that is closest to the dense model once its layers have been fitted one by one, and metrics.

        Args:
            kls: name -> divergence after a cheap refit.
            families: name -> what a shape has in common with those that are tried for having fewer layers.
            always: shapes that become finalists if they are not far from the best.
        """
        closest = min(kls.values())
        if not self._refits or not self._context.params.is_thorough:
            near = [name for name in kls if kls[name] <= max(closest, NEAR * closest if self._refits else closest)]
            return min(near, key=lambda name: (len(shapes[name].layers), kls[name])), {}
        farthest = max(closest, WORST_FINALIST * closest)  # rounding can make a divergence of zero negative
        competing = [name for name in sorted(kls, key=kls.__getitem__) if kls[name] <= farthest]
        layers = {name: len(shapes[name].layers) for name in competing}

        def with_fewer_layers(name: str) -> str | None:
            fewer = [other for other in competing if families[other] == families[name] and layers[other] < layers[name]]
            return max(fewer, key=layers.__getitem__, default=None)

        ahead = [name for name in competing if name in always]
        ahead += [name for name in competing if name not in always][:FINALISTS]
        best = ahead[0]
        if len(ahead) == 1 and with_fewer_layers(best) is None:
            return best, {}
        context, checkpoint, finalists_kl = self._context, self._checkpoint, dict[str, float]()
        dense = dense_states(context, checkpoint, self._judged_ST, Passes(1))
        while ahead:
            for name in ahead:
                kept = context.world.broadcast(kept_of(self._kinds, shapes[name]))
                # By least squares only: further steps take several times as long, and don't change the order.
                fitted = refit_layers(
                    context, checkpoint, kept, self._seen_ST, "final", phase=f"finalist {name}", whole_mlp=False
                )
                stream = stream_of(context, checkpoint, self._judged_ST, Passes(1))
                pruned = PrunedLayers(checkpoint, kept, fitted.replacements(kept.layers), stream.reader)
                stream.run_layers(context.reporting("comparison", len(kept.layers)), pruned.layers(kept.layers))
                (finalists_kl[name],) = mean_divergences(stream, dense, [stream.states])
            best = min(finalists_kl, key=finalists_kl.__getitem__)
            following = with_fewer_layers(best)
            ahead = [] if following is None or following in finalists_kl else [following]
        return best, {"finalists_kl": finalists_kl}
