"""Expected manifests of stages that have not run yet, as far as the plan decides their metrics.

Where a measurement decides a shape, the first of the competing shapes is assumed, which has as many parameters as the
others; where scores decide, every layer is assumed to lose the same share of its units.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.parameters import (
    DistillParameters,
    ImportanceParameters,
    LoraPruneParameters,
    PruneParameters,
    RecoverParameters,
    ReferenceParameters,
)
from hfprune_dist.config.training import RecoveryConfig, steps_per_epoch
from hfprune_dist.planning.budget import budget_of
from hfprune_dist.planning.known_sizes import packed_rows
from hfprune_dist.planning.local_shapes import LocalTarget
from hfprune_dist.planning.low_rank_shapes import LowRankTarget
from hfprune_dist.planning.plain_shapes import PlainShape, plain_shapes, step_of_layers
from hfprune_dist.planning.plan import Plan
from hfprune_dist.planning.search_work import FINALISTS
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.whole_expert_shapes import mixture_target
from hfprune_dist.planning.widths import Target, size_of
from hfprune_dist.store.stage import Stage
from hfprune_dist.structures import KV_GROUPS, LAYERS, NEURONS
from hfprune_dist.structures.kept import Shape

# core.width_search: shapes measured around two centres, two on each of four axes, plus the first and the last.
SEARCHED = 2 * 2 * 4 + 2
# core.final_norm and core.quasi_newton: the most passes of a fit of the final norm, and of all norms.
NORM_PASSES, NORMS_PASSES = 5, 8


class ExpectedManifests:
    """Expected manifests of a plan's stages, by stage id.

    Args:
        checkpointing: whether calibration recomputes activations in backward.
    """

    def __init__(self, plan: Plan, *, checkpointing: bool) -> None:
        self._plan = plan
        self._runtime = {"activation_checkpointing": checkpointing}

    def of(self, stage_id: str) -> dict[str, Any] | None:
        """The expected manifest of a stage; None if its work can't be known yet."""
        metrics = self._metrics(self._plan.stages[stage_id])
        return None if metrics is None else {"metrics": metrics, "config": {"runtime": self._runtime}}

    def dense(self, stage: Stage) -> Checkpoint:
        """The dense checkpoint that a stage's model comes from."""
        return self._plan.dense_checkpoint(stage)

    def _metrics(self, stage: Stage) -> dict[str, Any] | None:
        match stage.params:
            case ImportanceParameters(calibration=calibration):
                return {"tokens": calibration.samples * calibration.sequence_length}
            case ReferenceParameters(text=text) if text is not None:
                return {"tokens": text.windows * text.sequence_length}
            case ReferenceParameters():
                return self._metrics(self._plan.stages[stage.inputs["importance"].location])
            case DistillParameters():
                return self._metrics(self._plan.stages[stage.inputs["reference"].location])
            case PruneParameters() as params:
                return self._cut(stage, params) | _of_norms(params)
            case RecoverParameters(recovery=recovery):
                return _trained(recovery)
            case LoraPruneParameters(recovery=recovery) as params:
                sizes = _sizes(self.dense(stage), _kinds_of(self._local(stage, params), params))
                return sizes | (_trained(recovery) or {})
        return None

    def _cut(self, stage: Stage, params: PruneParameters) -> dict[str, Any]:
        dense = self.dense(stage)
        size = size_of(dense)
        if params.allocation == "plain":
            before = self._before(stage)
            shapes = plain_shapes(ShapeTarget.of(dense, params, stage.label), before)
            return _plain(dense, params, before, shapes)
        if dense.family.experts:
            shape = mixture_target(ShapeTarget.of(dense, params, stage.label)).shape()
            return _sizes(dense, shape.units)
        if params.allocation == "uniform":
            width = Target(size, params.ratio, params.multiple_of, stage.label).uniform_width()
            return dense.units.sizes([width] * size.num_layers)
        if params.allocation == "low_rank":
            return _low_rank(dense, params, stage.label)
        if params.allocation == "local":
            return _sizes(dense, _kinds_of(self._local(stage, params), params))
        metrics = _alike(dense, params)
        return metrics | (self._searched(stage, params) if params.allocation == "searched" else {})

    def _searched(self, stage: Stage, params: PruneParameters) -> dict[str, Any]:
        """Metrics of a layer-by-layer search, assuming that the last layers go first, and that earlier rounds removed
        no layers.
        """
        shapes: list[str] = [f"shape {number}" for number in range(SEARCHED)]
        if LAYERS not in params.structures:
            return {"search_kl": dict.fromkeys(shapes)}
        dense = self.dense(stage)
        counts, layers = dense.parameter_counts, dense.num_layers
        removed = round(self._earlier(stage)[1].ratio * counts.total) if "dense" in stage.inputs else 0
        budget = budget_of(ShapeTarget.of(dense, params, stage.label), params.limits()).left(range(layers), removed)
        gone = budget.most_layers_gone(counts.layers)
        fits = [
            it
            for it in range(0, gone + 1, step_of_layers(layers))
            if sum(counts.layers[layers - it :]) <= budget.parameters
        ]
        contests = [f"{layers - it} layers" for it in fits] if len(fits) > 1 else []
        return {
            "layers_in_order_of_dropping": [*range(layers)][layers - gone :][::-1],
            "search_kl": dict.fromkeys([*contests, *shapes]),
            "finalists_kl": dict.fromkeys(contests[:FINALISTS] if params.refit != "none" else []),
        }

    def _local(self, stage: Stage, params: PruneParameters | LoraPruneParameters) -> Shape:
        """The local shape of a stage, which the ratio and earlier rounds decide."""
        target = LocalTarget.of(self.dense(stage), params, stage.label)
        if "dense" not in stage.inputs:
            return target.shape()
        return replace(target, before=self._local(*self._earlier(stage))).shape()

    def _earlier(self, stage: Stage) -> tuple[Stage, PruneParameters]:
        """The round before a stage, and its parameters."""
        earlier = self._plan.stages[stage.inputs["model"].location]
        assert isinstance(earlier.params, PruneParameters), f"{earlier.id} is not a round"
        return earlier, earlier.params

    def _before(self, stage: Stage) -> PlainShape:
        """The shape that a search for a plain shape starts from, if the first candidate wins in every round."""
        dense = self.dense(stage)
        if "dense" not in stage.inputs:
            return PlainShape.of(dense)
        earlier, params = self._earlier(stage)
        return plain_shapes(ShapeTarget.of(dense, params, earlier.label), self._before(earlier))[0]


def _of_norms(params: PruneParameters) -> dict[str, Any]:
    if params.refit_norms:
        return {"norms_kl": [None] * NORMS_PASSES}
    return {"final_norm_kl": [None] * NORM_PASSES} if params.refit_final_norm else {}


def _trained(recovery: RecoveryConfig) -> dict[str, Any] | None:
    """Metrics of training on instruction pairs; None if the numbers of both pairs and steps are unknown."""
    rows = packed_rows(recovery)
    if rows is None and recovery.max_steps is None:
        return None
    known = rows or recovery.batch_size
    return {"rows": known, "steps": recovery.steps(steps_per_epoch(known, recovery.batch_size))}


def _kinds_of(shape: Shape, params: PruneParameters | LoraPruneParameters) -> dict[str, Sequence[int]]:
    """Numbers of those units of a shape that a stage may remove."""
    return {kind: shape.units[kind] for kind in params.structures}


def _alike(dense: Checkpoint, params: PruneParameters) -> dict[str, Any]:
    """Sizes of layers that all lose the same share of their units; neurons make up for the rounding of KV groups."""
    counts = dense.parameter_counts
    left = params.ratio * counts.total
    sizes: dict[str, list[int]] = {}
    kinds = [kind for kind in (KV_GROUPS, NEURONS) if kind in params.structures]
    for number, kind in enumerate(kinds):
        units = dense.structures[kind]
        share = left / sum(counts.units[it] * sum(dense.structures[it].counts) for it in kinds[number:])
        sizes[kind] = [max(1, round(count * (1 - share))) for count in units.counts]
        left -= counts.units[kind] * (sum(units.counts) - sum(sizes[kind]))
    return _sizes(dense, sizes)


def _sizes(dense: Checkpoint, counts: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """Sizes by their names in metrics, for numbers of units: kind -> number in each layer."""
    metrics: dict[str, Any] = {}
    for kind, of_layers in counts.items():
        metrics |= dense.structures[kind].sizes(of_layers)
    return metrics


def _plain(
    dense: Checkpoint, params: PruneParameters, before: PlainShape, shapes: Sequence[PlainShape]
) -> dict[str, Any]:
    """Metrics of a search for a plain shape, assuming that the last layers are dropped first."""
    names = [it.name for it in shapes]
    first, layers = shapes[0], before.num_layers
    gone = layers - min(it.num_layers for it in shapes)
    metrics = dense.units.sizes([first.width] * first.num_layers)
    metrics |= dense.structures[KV_GROUPS].sizes([first.kv_groups] * first.num_layers)
    finalists = names[: FINALISTS + 1] if params.refit != "none" and len(names) > 1 else []
    return metrics | {
        "num_hidden_layers": first.num_layers,
        "layers_in_order_of_dropping": [*range(layers)][layers - gone :][::-1],
        "search_kl": dict.fromkeys(names),
        "finalists_kl": dict.fromkeys(finalists),
    }


def _low_rank(dense: Checkpoint, params: PruneParameters, where: str) -> dict[str, Any]:
    shape = LowRankTarget(ShapeTarget.of(dense, params, where)).shape()
    ranks = {name.rpartition(".")[2]: row[0] for name, row in shape.ranks.items()}
    return dense.units.sizes(shape.units[NEURONS]) | {"attention_ranks": ranks}
