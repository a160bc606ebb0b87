"""The plain shape of a smaller model, the same in all layers, found by measuring candidates rather than assumed.

Layers are first ordered by how little the model misses them. Candidates on a grid then differ in how many layers, KV
groups and neurons they keep, all with about the same number of parameters; they are measured with a cheap refit. The
candidate that prunes only MLPs and the best others are then fitted layer by layer, and compared on windows that nothing
in the stage has been fitted to or measured on. The closest gets its final refit, on all windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.planning.plain_shapes import PlainShape, fitted_to_layers, plain_shapes
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.refit.candidates import Scored, kept_of
from hfprune_dist.refit.measurement import Candidate
from hfprune_dist.stages.cheap_measurement import CheapMeasurements
from hfprune_dist.stages.final_refit import final_refit
from hfprune_dist.stages.finals import FINALISTS, Finals, SplitWindows, hopeful
from hfprune_dist.stages.prune_refit import (
    Context,
    Replacements,
    pruned_kinds,
    refit_metrics,
)
from hfprune_dist.structures import KV_GROUPS, NEURONS, kinds_among
from hfprune_dist.structures.kept import Kept


def decide_plain(
    context: Context, checkpoint: Checkpoint, scores: Mapping[str, Sequence[Tensor]]
) -> tuple[Kept, Replacements, dict[str, Any]]:
    """What stays, its refitted weights, and metrics of the search; the same on every rank.

    Args:
        scores: kind -> scores of each layer's units.
    """
    windows = SplitWindows.apart(context.calibration_windows(), context.params.forward_pass()[1])
    kinds = [Scored(units, scores[units.kind]) for units in pruned_kinds(context, checkpoint)]
    measurements = CheapMeasurements(context, checkpoint, kinds, windows.seen_ST)
    target = ShapeTarget.of(checkpoint, context.params, context.stage.label)
    planned = plain_shapes(target)
    order = _layers_in_order(measurements, target, fewest=min(shape.num_layers for shape in planned))
    grid = _Grid(measurements, target, planned, order)
    kls = grid.kl()
    metrics: dict[str, Any] = {"layers_in_order_of_dropping": [*order], "search_kl": kls}
    if context.params.refit == "none":
        return grid.kept(min(kls, key=kls.__getitem__)), {}, metrics
    competing = hopeful(kls)
    finals = Finals(context, checkpoint, windows, grid.kept)
    best = finals.closest(_first_finalists(competing, grid), lambda closest: grid.with_fewer_layers(closest, competing))
    kept = grid.kept(best)
    fitted = final_refit(context, checkpoint, kept)
    metrics |= {"finalists_kl": finals.kl} if finals.kl else {}
    return kept, fitted.replacements(kept.layers), metrics | refit_metrics(fitted, kept.layers)


def _first_finalists(competing: Sequence[str], grid: _Grid) -> list[str]:
    """The shape that prunes only MLPs, and the best others.

    Args:
        competing: names of shapes, the closest first.
    """
    mlp_alone = [shape for shape in competing if grid.is_mlp_alone(shape)]
    return [*mlp_alone, *[shape for shape in competing if shape not in mlp_alone][:FINALISTS]]


def _layers_in_order(measurements: CheapMeasurements, target: ShapeTarget, fewest: int) -> list[int]:
    """The layers that candidates drop, in the order in which they go; collective.

    Args:
        fewest: how many layers stay in the candidate that has the fewest.

    Raises:
        Interrupted: if any rank was asked to end.
    """
    checkpoint = measurements.checkpoint
    droppable = [layer for layer in range(checkpoint.num_layers) if layer not in target.undroppable]
    return measurements.layers_in_order(droppable, checkpoint.num_layers - fewest)


class _Grid:
    """Candidate shapes, and how far from the dense model a cheap refit leaves each of them.

    Args:
        planned: shapes with the widths that the ratio asks for if all layers have the same size.
        order: the layers that candidates drop, in the order in which they go.
    """

    def __init__(
        self,
        measurements: CheapMeasurements,
        target: ShapeTarget,
        planned: Sequence[PlainShape],
        order: Sequence[int],
    ) -> None:
        self._measurements = measurements
        self._context = measurements.context
        self._checkpoint = measurements.checkpoint
        self._order = order
        fitted = [fitted_to_layers(target, it, self._layers_of(it)) for it in planned]
        shapes = [it for it in fitted if it is not None] or planned
        self._shapes = {it.name: it for it in shapes}

    def is_mlp_alone(self, name: str) -> bool:
        """Whether a shape keeps all layers and all KV groups."""
        shape, groups = self._shapes[name], self._checkpoint.structures[KV_GROUPS].most
        return (shape.num_layers, shape.kv_groups) == (self._checkpoint.num_layers, groups)

    def with_fewer_layers(self, name: str, competing: Sequence[str]) -> str | None:
        """The next of the competing shapes with the same number of KV groups and fewer layers, if any."""
        shape, shapes = self._shapes[name], self._shapes
        fewer = [
            it
            for it in competing
            if shapes[it].kv_groups == shape.kv_groups and shapes[it].num_layers < shape.num_layers
        ]
        return max(fewer, key=shapes.__getitem__, default=None)

    def kept(self, name: str) -> Kept:
        """What rank 0 would keep of a shape, on every rank."""
        return self._context.world.broadcast(kept_of(self._measurements.kinds, self._candidate(self._shapes[name])))

    def kl(self) -> dict[str, float]:
        """Divergence of every shape from the dense model, nats per token."""
        refit = self._context.params.refit != "none"
        measurement = self._measurements.measurement("shapes", refit=refit, measurements=1)
        candidates = [self._candidate(shape) for shape in self._shapes.values()]
        return dict(zip(self._shapes, measurement.kl(candidates), strict=True))

    def _candidate(self, shape: PlainShape) -> Candidate:
        """The candidate with a shape's units in each of the layers that are missed most."""
        gone = self._gone(shape)
        counts = {NEURONS: shape.width, KV_GROUPS: shape.kv_groups}
        choice = tuple(counts[kind] for kind in kinds_among(self._context.params.structures))
        return tuple(None if layer in gone else choice for layer in range(self._checkpoint.num_layers))

    def _gone(self, shape: PlainShape) -> Sequence[int]:
        return self._order[: self._checkpoint.num_layers - shape.num_layers]

    def _layers_of(self, shape: PlainShape) -> list[int]:
        """Numbers of the layers that a shape keeps."""
        gone = self._gone(shape)
        return [layer for layer in range(self._checkpoint.num_layers) if layer not in gone]
