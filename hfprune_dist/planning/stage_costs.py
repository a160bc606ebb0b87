"""Costs of stages in tokens and floating-point operations, from settings, shapes and manifests.

Operations are analytic, not measured: matrix products as the code performs them (``footprint``, ``layer_pass_work``,
``search_work``), so that they are known even for artifacts that don't record them. Only what runs is counted: backward
computes gradients of activations in a calibration pass, of activations and adapters with LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from hfprune_dist.checkpoints.families import FAMILIES
from hfprune_dist.config.parameters import (
    DistillParameters,
    ImportanceParameters,
    LoraPruneParameters,
    PruneParameters,
    RecoverParameters,
    ReferenceParameters,
)
from hfprune_dist.config.training import steps_per_epoch
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.errors import UserError
from hfprune_dist.planning.importance_job import importance_job
from hfprune_dist.planning.layer_pass_work import (
    ITERATIONS,
    WindowCounts,
    copies,
    dense_refit,
    final_norm_refit,
    forward_of_all,
    gram,
    low_rank,
    norms_refit,
    residual_checks,
    second_moments,
    sequential_refit,
)
from hfprune_dist.planning.model_shape import ModelShape
from hfprune_dist.planning.operations import NO_OPERATIONS, Operations
from hfprune_dist.planning.plan import Plan
from hfprune_dist.planning.search_work import Search, layers_in_order
from hfprune_dist.planning.training_footprint import Train
from hfprune_dist.store.artifacts import Manifest
from hfprune_dist.store.atomic_files import read_object
from hfprune_dist.store.stage import CUTTING, Stage
from hfprune_dist.structures import KV_GROUPS


@dataclass(frozen=True)
class Cost:
    """The tokens and operations of one stage.

    Attributes:
        tokens: those of calibration windows, once for each stage whose model reads them; those of training rows, as
            often as they are trained on.
        operations: those of all ranks together.
        without_copies: what they would be if the refit saw no copies of windows; None if it sees none.
        added_up: numbers that ranks add up in Gauss-Newton steps, the same for any number of windows.
    """

    tokens: int
    operations: Operations
    without_copies: Operations | None = None
    added_up: int = 0

    @property
    def flops(self) -> float:
        """Floating-point operations of every kind."""
        return self.operations.total


NOTHING = Cost(0, NO_OPERATIONS)


class StageCosts:
    """Costs of a plan's stages.

    Args:
        manifest_of: returns a stage's manifest by the stage's id; None if there is none.
    """

    def __init__(self, plan: Plan, manifest_of: Callable[[str], Manifest | None]) -> None:
        self._plan = plan
        self._manifest_of = manifest_of
        self._config_of = cache(read_object)

    def of(self, stage_id: str) -> Cost | None:
        """The cost of a stage; None if it has no artifact (yet) or too little is known, as with records of other
        versions and models whose configuration is gone.
        """
        manifest = self._manifest_of(stage_id)
        if manifest is None:
            return None
        try:
            return self._cost(self._plan.stages[stage_id], manifest)
        except (LookupError, TypeError, ValueError):
            return None

    def _cost(self, stage: Stage, manifest: Manifest) -> Cost:
        metrics = manifest["metrics"]
        match stage.params:
            case ImportanceParameters() as params:
                runtime = manifest.get("config", {}).get("runtime", {})
                checkpointing = bool(runtime.get("activation_checkpointing", False))
                return self._importance(stage, params, metrics["tokens"], checkpointing)
            case ReferenceParameters(text=text):
                length = self._calibration(stage).length if text is None else text.sequence_length
                products = metrics["tokens"] * forward_of_all(self.shape(stage), length)
                return Cost(metrics["tokens"], Operations(products))
            case PruneParameters() as params:
                return self._prune(stage, params, metrics)
            case DistillParameters(distillation=settings, passes=passes):
                length = self._calibration(self._need(stage, "reference")).length
                job = Train.of(settings, length, distills=True).resized(1)
                tokens = passes * metrics["tokens"]
            case RecoverParameters(recovery=settings) | LoraPruneParameters(recovery=settings):
                job = Train.of(settings, settings.sequence_length, distills=False).resized(1)
                tokens = rows_trained(metrics["rows"], settings.batch_size, metrics["steps"]) * settings.sequence_length
            case _:
                raise _UnknownError
        products = tokens / job.tokens * self.shape(stage).mean(lambda dims: job.work(dims).flops)
        return Cost(tokens, Operations(products) + self._scores_of_training(stage, metrics))

    def _scores_of_training(self, stage: Stage, metrics: Mapping[str, Any]) -> Operations:
        """LoRAPrune's scores: in each step, three products of LoRA's factors for each weight that units own."""
        params = stage.params
        if not isinstance(params, LoraPruneParameters):
            return NO_OPERATIONS
        scored = scored_weights(self._dense(stage), params)
        return Operations(float32=metrics["steps"] * 3 * 2 * params.recovery.rank * scored)

    def _importance(self, stage: Stage, params: ImportanceParameters, tokens: int, checkpointing: bool) -> Cost:
        """Cost of the pass over windows, and of the second one for criteria that need moments."""
        if all(CRITERIA[name].summed == "nothing" for name in params.criteria):
            return NOTHING
        shape, job = self.shape(stage), importance_job(params, checkpointing).resized(1)
        flops = Operations(tokens / job.tokens * shape.mean(lambda dims: job.work(dims).flops))
        if job.student and params.student is None:  # the first shard decides which neurons it lacks
            first = params.calibration.shard_size * params.calibration.micro_batch_size * job.tokens
            flops += Operations(min(first, tokens) * forward_of_all(shape, job.tokens))
        if job.curvature:
            kinds = 1 + job.kv_groups
            windows = WindowCounts(tokens // job.tokens, job.tokens, params.calibration.micro_batch_size)
            flops += Operations(float32=tokens * kinds * len(shape.layers) * gram(shape.hidden_size))
            flops += second_moments(shape, windows, kv_groups=job.kv_groups)
        return Cost(tokens, flops)

    def _prune(self, stage: Stage, params: PruneParameters, metrics: Mapping[str, Any]) -> Cost:
        """Cost of a search and of the refit of the result; nothing if scores alone decide."""
        searches = params.allocation in ("plain", "searched")
        if params.refit == "none" and not searches and params.allocation != "low_rank":
            return NOTHING
        model = self.shape(stage)
        dense = self._dense(stage)
        kept, windows, flops = dense.pruned(metrics), self._calibration(stage), NO_OPERATIONS
        if params.allocation == "low_rank":
            return Cost(windows.tokens, low_rank(dense, kept, windows))
        refitted = len(kept.layers)
        if searches:
            search = Search(params, model, dense, kept, windows, metrics)
            flops += search.operations()
            refitted = max(refitted, search.layers_refitted())
        if params.refit in ("layerwise", "block"):
            flops += residual_checks(dense, refitted, windows.length)
            if "dense" in stage.inputs:  # it wasn't scored: one micro-batch shows what its layers must compute
                flops += Operations(windows.micro_batch * windows.length * forward_of_all(dense, windows.length))
        if params.refit_norms:
            flops += norms_refit(dense, kept, windows, passes=len(metrics["norms_kl"]))
        elif params.refit_final_norm:
            flops += final_norm_refit(dense, kept, windows, passes=len(metrics["final_norm_kl"]))
        dropped = layers_in_order(metrics, model, dense)[: len(model.layers) - len(kept.layers)]
        refit = _FinalRefit(params, model, dense, kept, dropped)
        without_copies = flops + refit.operations(windows)
        if not params.refit_copies:
            return Cost(windows.tokens, without_copies, added_up=refit.added_up)
        flops += copies(dense, windows)
        flops += refit.operations(replace(windows, count=windows.count * (1 + params.refit_copies)))
        return Cost(windows.tokens, flops, without_copies, refit.added_up)

    def _calibration(self, stage: Stage) -> WindowCounts:
        """The calibration windows that a stage reads; only those that were scored, if the pass ended early."""
        scored = self._need(stage, "importance")
        if not isinstance(scored.params, ImportanceParameters):
            raise _UnknownError
        settings, manifest = scored.params.calibration, self._manifest_of(scored.id)
        tokens = settings.samples * settings.sequence_length if manifest is None else manifest["metrics"]["tokens"]
        size = getattr(stage.params, "micro_batch_size", None) or settings.micro_batch_size
        return WindowCounts(tokens // settings.sequence_length, settings.sequence_length, size)

    def _need(self, stage: Stage, role: str) -> Stage:
        return self._plan.stages[stage.inputs[role].location]

    def shape(self, stage: Stage) -> ModelShape:
        """The shape of the model that a stage reads.

        Raises:
            LookupError: if too little is known.
        """
        source = stage.inputs["model"]
        if not source.is_stage:
            return self._dense(stage)
        made_by = self._plan.stages[source.location]
        manifest = self._manifest_of(made_by.id)
        if made_by.kind not in CUTTING:
            return self.shape(made_by)
        if manifest is None:
            raise _UnknownError
        return self._dense(made_by).pruned(manifest["metrics"])

    def _dense(self, stage: Stage) -> ModelShape:
        folder = self._plan.dense_folder(stage)
        config = self._config_of(folder / "config.json")
        if config is None:
            raise _UnknownError
        if config.get("model_type") in FAMILIES:  # its weights may be gone by now
            return ModelShape.of_config(config)
        try:
            return ModelShape.of(self._plan.dense_checkpoint(stage))
        except UserError as error:
            raise _UnknownError from error


def scored_weights(dense: ModelShape, params: LoraPruneParameters) -> int:
    """Number of weights that each step of LoRAPrune scores, in the layers that lose units."""
    first, last = params.protected()
    layers = dense.layers[first : len(dense.layers) - last]
    return sum(sum(dims.layer_weights(attention=KV_GROUPS in params.structures)) for dims in layers)


class _UnknownError(LookupError):
    """Too little is known."""


def rows_trained(rows: int, batch_size: int, steps: int) -> int:
    """Rows that ``steps`` optimizer steps see, with epochs cut into steps as by ``data.schedule.Schedule``."""
    of_an_epoch = steps_per_epoch(rows, batch_size)
    epochs, part = divmod(steps, of_an_epoch)
    return epochs * rows + rows * part // of_an_epoch


@dataclass(frozen=True)
class _FinalRefit:
    """The refit of what a prune stage writes.

    Attributes:
        model: shape of the model that is pruned; ``dense`` and ``kept``, of the dense one and of the result.
        dropped: the layers that go.
    """

    params: PruneParameters
    model: ModelShape
    dense: ModelShape
    kept: ModelShape
    dropped: Sequence[int]

    @property
    def added_up(self) -> int:
        """As in ``Cost``: right sides and curvature of two steps, and a product for each iteration."""
        if self.params.refit != "block":
            return 0
        products = 2 + ITERATIONS + self.params.refit_iterations
        weights = (sum(dims.layer_weights(attention=False)) for dims in self.kept.layers)
        return products * sum(weights) + 2 * len(self.kept.layers) * self.kept.hidden_size**2

    def operations(self, windows: WindowCounts) -> Operations:
        """Its operations if it sees these windows."""
        refit, kv_groups = self.params.refit, KV_GROUPS in self.params.structures
        other_norms = self.params.mlp_targets is not None
        if refit == "none":
            return NO_OPERATIONS
        if refit == "bias":
            return Operations(windows.tokens * forward_of_all(self.model, windows.length))
        if refit == "dense":
            return dense_refit(self.model, self.kept, windows, kv_groups=kv_groups, dropped=self.dropped)
        more = self.params.refit_iterations if refit == "block" else 0
        return sequential_refit(
            self.dense, self.kept, windows, kv_groups=kv_groups, other_norms=other_norms, more_iterations=more
        )
