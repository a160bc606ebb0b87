"""The plain shape of a smaller model, the same in all layers, found by measuring candidates rather than assumed.

Layers are first ordered by how little the model misses them. Candidates on a grid then differ in how many layers, KV
groups and neurons they keep, all with about the same number of parameters; they are measured with a cheap refit. The
candidate that prunes only MLPs and the best others are then fitted layer by layer, and compared on windows that nothing
in the stage has been fitted to or measured on. The closest gets its final refit, on all windows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.planning.shapes import name_of_plain, shapes_for, with_layers
from hfprune_dist.planning.target import Target
from hfprune_dist.refit.candidates import Scored, kept_of
from hfprune_dist.stages.contest import candidate_of
from hfprune_dist.stages.prune_refit import (
    Context,
    pruned_kinds,
)
from hfprune_dist.stages.shape_search import FINALISTS, ShapeSearch, may_be_closest
from hfprune_dist.structures import KV_GROUPS, NEURONS
from hfprune_dist.structures.kept import Kept, Shape


def decide_plain(
    context: Context, checkpoint: Checkpoint, scores: Mapping[str, Sequence[Tensor]]
) -> tuple[Kept, dict[str, Any]]:
    """What stays, and metrics of the search.

    Args:
        scores: kind -> scores of each layer's units.
    """
    kinds = [Scored(units, scores[units.kind]) for units in pruned_kinds(context, checkpoint)]
    search = ShapeSearch(context, checkpoint, kinds, has_finals=True)
    target = Target.of(checkpoint, context.params, context.params.ratio, context.stage.label)
    planned = shapes_for(target)
    most_gone = checkpoint.num_layers - min(len(shape.layers) for shape in planned)
    order = search.layers_in_order(target.droppable, most_gone)
    grid = _Grid(search, target, planned, order)
    kls = grid.kl()
    metrics: dict[str, Any] = {"layers_in_order_of_dropping": [*order], "search_kl": kls}
    if context.params.refit == "none":
        return grid.kept(min(kls, key=kls.__getitem__)), metrics
    competing = may_be_closest(kls)
    first = _first_finalists(competing, grid)
    best = search.closest(first, grid.kept, lambda closest: grid.with_fewer_layers(closest, competing))
    return grid.kept(best), metrics | ({"finalists_kl": search.finalists_kl} if search.finalists_kl else {})


def _first_finalists(competing: Sequence[str], grid: _Grid) -> list[str]:
    """The shape that prunes only MLPs, and the best others.

    Args:
        competing: names of shapes, the closest first.
    """
    mlp_alone = [shape for shape in competing if grid.is_mlp_alone(shape)]
    return [*mlp_alone, *[shape for shape in competing if shape not in mlp_alone][:FINALISTS]]


class _Grid:
    """Candidate shapes, and how far from the dense model a cheap refit leaves each of them.

    Args:
        planned: shapes with the widths that the ratio asks for if all layers have the same size.
        order: the layers that candidates drop, in the order in which they go.
    """

    def __init__(
        self,
        search: ShapeSearch,
        target: Target,
        planned: Sequence[Shape],
        order: Sequence[int],
    ) -> None:
        self._search = search
        self._context = search.context
        self._checkpoint = search.checkpoint
        num_layers, fitted = self._checkpoint.num_layers, []
        for it in planned:
            gone = order[: num_layers - len(it.layers)]
            layers = tuple(layer for layer in range(num_layers) if layer not in gone)
            fitted.append((replace(it, layers=layers), with_layers(target, layers, it.units[KV_GROUPS][0])))
        shapes = [it for _, it in fitted if it is not None] or [it for it, _ in fitted]
        self._shapes = {name_of_plain(it): it for it in shapes}

    def is_mlp_alone(self, name: str) -> bool:
        """Whether a shape keeps all layers and all KV groups."""
        groups = self._checkpoint.structures[KV_GROUPS].most
        return _order_of(self._shapes[name])[:2] == (self._checkpoint.num_layers, groups)

    def with_fewer_layers(self, name: str, competing: Sequence[str]) -> str | None:
        """The next of the competing shapes with the same number of KV groups and fewer layers, if any."""
        order = {it: _order_of(self._shapes[it]) for it in competing}
        layers, groups, _ = _order_of(self._shapes[name])
        fewer = [it for it in competing if order[it][0] < layers and order[it][1] == groups]
        return max(fewer, key=order.__getitem__, default=None)

    def kept(self, name: str) -> Kept:
        """What rank 0 would keep of a shape, on every rank."""
        kinds = self._search.kinds
        return self._context.world.broadcast(kept_of(kinds, candidate_of(kinds, self._shapes[name])))

    def kl(self) -> dict[str, float]:
        """Divergence of every shape from the dense model, nats per token."""
        refit = self._context.params.refit != "none"
        measurement = self._search.measurement("shapes", refit=refit, measurements=1)
        candidates = [candidate_of(self._search.kinds, shape) for shape in self._shapes.values()]
        return dict(zip(self._shapes, measurement.kl(candidates), strict=True))


def _order_of(shape: Shape) -> tuple[int, int, int]:
    """Numbers of layers, of KV groups and of neurons."""
    return len(shape.layers), shape.units[KV_GROUPS][0], shape.units[NEURONS][0]
