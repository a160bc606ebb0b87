"""The plain shape of a smaller model, the same in all layers, found by measuring candidates and not assumed.

Layers are put in the order in which they are missed least. Candidates on a grid then differ in how many layers, KV
groups and neurons they keep, all with about the same number of parameters; they are measured with a cheap refit. The
one that prunes MLPs alone and the best others are then fitted layer after layer, and compared on windows that nothing
before saw. As that makes up for more where layers went, the closest is tried with fewer layers, as long as that helps.
The closest of all gets its final refit on all windows.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.planning.plain_shapes import PlainShape, plain_shapes
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.refit.cheap_fits import Scored, kept_of
from hfprune_dist.refit.finished_layers import FinishedLayers, candidates_of
from hfprune_dist.refit.measurement import Candidate, Measurement, one_by_one
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.stages.cheap_measurement import Measured
from hfprune_dist.stages.prune_refit import (
    Context,
    Replacements,
    after_each_layer,
    final_refit,
    probe_of,
    pruned_kinds,
    refit_layers,
    stream_of,
    told_of_refit,
)
from hfprune_dist.structures import KV_GROUPS, NEURONS, kinds_among
from hfprune_dist.structures.kept import Kept

# One in so many windows is kept apart from all of that, to compare finalists.
JUDGED_EVERY = 16
# Candidates of the grid that are finalists, beside the one that prunes MLPs alone.
FINALISTS = 2
# Those that cheap refits leave so many times farther than the closest are not. Better refits turned the order of shapes
# of a small model around where that was 1.06 or 1.14, but not where it was 1.30, 1.42 or 1.51.
HOPELESS = 1.25


@dataclass(frozen=True)
class _Windows:
    """Calibration windows: those that refits and the grid see, and the others one by one."""

    seen_ST: Tensor
    judged: Mapping[int, Tensor]


def decide_plain(
    context: Context, checkpoint: Checkpoint, scores: Mapping[str, Sequence[Tensor]]
) -> tuple[Kept, Replacements, dict[str, Any]]:
    """What stays, its refitted weights, and metrics of the search; the same on every rank.

    Args:
        scores: kind -> of each layer's units.
    """
    windows = _apart(context.calibration_windows(), context.params.forward_pass()[1])
    grid = _Grid(context, checkpoint, scores, windows.seen_ST)
    kls = grid.kl()
    told: dict[str, Any] = {
        "layers_in_order_of_dropping": grid.order,
        "search_kl": {_name(shape): kl for shape, kl in kls.items()},
    }
    if context.params.refit == "none":
        return grid.kept(min(kls, key=kls.__getitem__)), {}, told
    best, *rivals = _hopeful(kls)
    if rivals:
        finals = _Finals(context, checkpoint, windows)
        best = _closest_finalist(finals, [best, *rivals], grid)
        told["finalists_kl"] = {_name(shape): kl for shape, kl in finals.kl.items()}
    kept = grid.kept(best)
    fitted = final_refit(context, (checkpoint, checkpoint), kept)
    return kept, fitted.replacements(kept.layers), told | told_of_refit(fitted, kept.layers)


def _hopeful(kls: Mapping[PlainShape, float]) -> list[PlainShape]:
    """The shapes that may turn out to be the closest, the closest after a cheap refit first."""
    closest = min(kls.values())
    return [shape for shape in sorted(kls, key=kls.__getitem__) if kls[shape] <= HOPELESS * closest]


def _closest_finalist(finals: _Finals, hopeful: Sequence[PlainShape], grid: _Grid) -> PlainShape:
    """The shape that is closest once its layers were fitted one after the other.

    Args:
        hopeful: the closest after a cheap refit first.
    """
    ahead = _first_finalists(hopeful, grid)
    while ahead:
        finals.hold({shape: grid.kept(shape) for shape in ahead})
        ahead = _with_fewer_layers(finals.best, hopeful, tried=finals.kl)
    return finals.best


def _first_finalists(hopeful: Sequence[PlainShape], grid: _Grid) -> list[PlainShape]:
    """The shape that prunes MLPs alone, and the best others.

    Args:
        hopeful: the closest first.
    """
    mlp_alone = [shape for shape in hopeful if grid.is_mlp_alone(shape)]
    return [*mlp_alone, *[shape for shape in hopeful if shape not in mlp_alone][:FINALISTS]]


def _with_fewer_layers(
    best: PlainShape, hopeful: Sequence[PlainShape], tried: Collection[PlainShape]
) -> list[PlainShape]:
    """What is next to the best with fewer layers; nothing where there is none or it was tried."""
    fewer = [it for it in hopeful if it.kv_groups == best.kv_groups and it.num_layers < best.num_layers]
    return [shape for shape in sorted(fewer)[-1:] if shape not in tried]


def _apart(windows_ST: Tensor, micro_batch_size: int) -> _Windows:
    """The last windows are kept apart; where there is one micro-batch alone, it is both."""
    batches = windows_ST.split(micro_batch_size)
    judged = max(1, len(batches) // JUDGED_EVERY)
    if len(batches) == 1:
        return _Windows(windows_ST, one_by_one(windows_ST))
    return _Windows(torch.cat(batches[:-judged]), one_by_one(torch.cat(batches[-judged:])))


class _Grid:
    """Candidates, and how far models of their shape are from the dense one after a cheap refit."""

    def __init__(
        self, context: Context, checkpoint: Checkpoint, scores: Mapping[str, Sequence[Tensor]], windows_ST: Tensor
    ) -> None:
        self._context = context
        self._checkpoint = checkpoint
        self._kinds = [Scored(units, scores[units.kind]) for units in pruned_kinds(context, checkpoint)]
        self._measured = Measured(context, checkpoint, checkpoint, self._kinds, windows_ST)
        self._target = ShapeTarget.of(checkpoint, context.params, context.stage.label)
        self._shapes = plain_shapes(self._target)
        self.order = self._order()

    def is_mlp_alone(self, shape: PlainShape) -> bool:
        """Whether it keeps all layers and all KV groups."""
        groups = self._checkpoint.structures[KV_GROUPS].most
        return (shape.num_layers, shape.kv_groups) == (self._checkpoint.num_layers, groups)

    def kept(self, shape: PlainShape) -> Kept:
        """What rank 0 would keep, on every rank."""
        return self._context.world.broadcast(kept_of(self._kinds, self._candidate(shape)))

    def kl(self) -> dict[PlainShape, float]:
        """Nats per token of every shape."""
        refit, folder = self._context.params.refit != "none", self._context.work / "shapes"
        measurement = self._measured.measurement("shapes", folder, refit=refit, measurements=1)
        return dict(zip(self._shapes, measurement.kl([self._candidate(it) for it in self._shapes]), strict=True))

    def _candidate(self, shape: PlainShape) -> Candidate:
        """So many units in each of the layers that are missed most."""
        gone = self.order[: self._checkpoint.num_layers - shape.num_layers]
        counts = {NEURONS: shape.width, KV_GROUPS: shape.kv_groups}
        choice = tuple(counts[kind] for kind in kinds_among(self._context.params.structures))
        return tuple(None if layer in gone else choice for layer in range(self._checkpoint.num_layers))

    def _order(self) -> list[int]:
        """The layers that candidates lack, in the order in which they go."""
        count = self._checkpoint.num_layers - min(shape.num_layers for shape in self._shapes)
        stuck = self._target.undroppable
        droppable = [layer for layer in range(self._checkpoint.num_layers) if layer not in stuck]
        return self._measured.layers_in_order(droppable, count)


def _name(shape: PlainShape) -> str:
    return f"{shape.num_layers} layers, {shape.kv_groups} KV groups, width {shape.width}"


class _Finals:
    """Shapes that are fitted layer after layer, compared on windows that were kept apart.

    Attributes:
        kl: how far each is from the dense model, nats per token.
    """

    def __init__(self, context: Context, checkpoint: Checkpoint, windows: _Windows) -> None:
        self._context = context
        self._checkpoint = checkpoint
        self._windows = windows
        self._models: dict[PlainShape, tuple[Kept, RefittedLayers]] = {}
        self.kl: dict[PlainShape, float] = {}

    @property
    def best(self) -> PlainShape:
        """The closest; of those that are as close, the first."""
        return min(self.kl, key=self.kl.__getitem__)

    def hold(self, kepts: Mapping[PlainShape, Kept]) -> None:
        """Refit and compare some more."""
        for shape, kept in kepts.items():
            self._models[shape] = kept, self._fitted(shape, kept)
        candidates = candidates_of([kept for kept, _ in self._models.values()], self._checkpoint.num_layers)
        self.kl = dict(zip(self._models, self._measurement().kl(candidates), strict=True))

    def _fitted(self, shape: PlainShape, kept: Kept) -> RefittedLayers:
        """Least squares alone: steps that follow it take several times as long and leave the order as it is."""
        context, checkpoint = self._context, self._checkpoint
        folder = context.work / f"final-{shape.num_layers}-{shape.kv_groups}-{shape.width}"
        fitted = RefittedLayers(checkpoint, pruned_kinds(context, checkpoint), whole_mlp=False, folder=folder)
        refit_layers(context, (checkpoint, checkpoint), kept, self._windows.seen_ST, fitted, phase="finalists")
        return fitted

    def _measurement(self) -> Measurement:
        """Of all models so far, of which it knows those that were compared before."""
        context, checkpoint = self._context, self._checkpoint
        name, size = context.params.forward_pass()
        probe = probe_of(context, checkpoint, self._windows.seen_ST)

        def variants() -> FinishedLayers:
            through_ST = probe.micro_batch_of(self._windows.seen_ST, size)
            models = list(self._models.values())
            return FinishedLayers(models, stream_of(context, checkpoint, through_ST, probe))

        return Measurement(
            checkpoint,
            variants,
            self._windows.judged,
            dtype=getattr(torch, name),
            world=context.world,
            folder=context.work / "finalists",
            after_each=after_each_layer(context, "comparison", checkpoint.num_layers),
        )
