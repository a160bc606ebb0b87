"""Which job each stage does with the model that it runs, for estimates of memory, and on which GPUs."""

from __future__ import annotations

import dataclasses

from hfprune_launch.slurm.profile import Resources

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.parameters import (
    DistillParameters,
    EfficiencyParameters,
    EvaluateParameters,
    ImportanceParameters,
    LoraPruneParameters,
    PruneParameters,
    RecoverParameters,
    ReferenceParameters,
)
from hfprune_dist.config.recorded import Parameters
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.config.texts import FIRST, CalibrationConfig, FidelityConfig, reference_role
from hfprune_dist.core.memory_limits import WEIGHTS_SHARE
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.evaluation_footprint import Evaluate
from hfprune_dist.planning.footprint import Job
from hfprune_dist.planning.generation_footprint import Generate
from hfprune_dist.planning.gpu_needs import GIB, ITEMSIZE, Gpus
from hfprune_dist.planning.importance_job import importance_job
from hfprune_dist.planning.layer_pass_footprint import LowRank, Reference, Refit
from hfprune_dist.planning.plain_shapes import all_plain_shapes
from hfprune_dist.planning.plan import Plan
from hfprune_dist.planning.shape_target import ShapeTarget
from hfprune_dist.planning.shapes import shapes_for
from hfprune_dist.planning.training_footprint import Train
from hfprune_dist.planning.training_memory import copy_of, place
from hfprune_dist.store.stage import Stage
from hfprune_dist.structures import KV_GROUPS


def runs_a_model(params: Parameters) -> bool:
    """Return whether a stage needs GPU memory that is estimated."""
    return not isinstance(params, PruneParameters) or params.refit != "none" or params.allocation == "low_rank"


def job_of(plan: Plan, stage: Stage, runtime: RuntimeConfig) -> Job:
    """Return the job that a stage does with the model it runs."""
    match stage.params:
        case ImportanceParameters() as params:
            return importance_job(params, runtime.activation_checkpointing)
        case ReferenceParameters() as params:
            return _reference(params, plan, stage)
        case PruneParameters() as params:
            return _refit(params, plan, stage)
        case RecoverParameters(recovery=settings) | LoraPruneParameters(recovery=settings):
            masks = isinstance(stage.params, LoraPruneParameters)
            return Train.of(settings, settings.sequence_length, distills=False, masks=masks)
        case DistillParameters(distillation=settings):
            return Train.of(settings, _calibration(plan, stage).sequence_length, distills=True)
        case EvaluateParameters() as params:
            batch_size = params.batch_size if params.tasks else 0
            return Evaluate.of(batch_size, _held_out(plan, stage).sequence_length, ITEMSIZE[params.dtype])
        case EfficiencyParameters() as params:
            return Generate.of(params, plan.dense_checkpoint(stage))
    raise AssertionError(f"{stage.id} was planned by another version of the code")


def _reference(params: ReferenceParameters, plan: Plan, stage: Stage) -> Reference:
    text = params.text or _calibration(plan, stage)
    samples = text.windows if isinstance(text, FidelityConfig) else text.samples
    windows = min(params.micro_batch_size, samples)
    return Reference(windows, text.sequence_length, samples, ITEMSIZE[params.dtype])


def _refit(params: PruneParameters, plan: Plan, stage: Stage) -> Refit | LowRank | Reference:
    calibration, dense = _calibration(plan, stage), plan.dense_checkpoint(stage)
    dtype, windows = params.forward_pass()
    if params.refit == "bias":  # the means are vectors and take next to no memory
        windows = min(windows, calibration.samples)
        return Reference(windows, calibration.sequence_length, calibration.samples, ITEMSIZE[dtype])
    if params.allocation == "low_rank":
        at_once = min(windows, calibration.samples)
        return LowRank(at_once, calibration.sequence_length, calibration.samples, ITEMSIZE[dtype])
    return Refit(
        windows=min(windows, calibration.samples * (1 + params.refit_copies)),
        tokens=calibration.sequence_length,
        samples=calibration.samples,
        copies=params.refit_copies,
        pursues=params.refit != "dense",
        norms=params.refit_norms,
        steps=params.refit == "block",
        searches=params.allocation in ("plain", "searched"),
        share_kept=_most_kept(params, stage, dense) / dense.units.most,
        itemsize=ITEMSIZE[dtype],
        kv_groups=KV_GROUPS in params.structures,
    )


def _most_kept(params: PruneParameters, stage: Stage, dense: Checkpoint) -> int:
    """Return the most units that a layer may keep, as far as the plan decides it; all of them if layers compete."""
    target = ShapeTarget.of(dense, params, stage.label)
    shapes = shapes_for(target, params)
    if params.allocation == "plain":  # the width makes up for the sizes of the layers that go
        return max(shape.width for shape in all_plain_shapes(target))
    return max(count for shape in shapes for count in shape.counts(dense.units)) if shapes else dense.units.most


def _held_out(plan: Plan, stage: Stage) -> FidelityConfig:
    """Return the settings of an evaluation's text; if there are several, they differ in nothing that counts here."""
    params = plan.stages[stage.inputs[reference_role(FIRST)].location].params
    assert isinstance(params, ReferenceParameters) and params.text is not None
    return params.text


def _calibration(plan: Plan, stage: Stage) -> CalibrationConfig:
    """Return the settings of the calibration windows that a stage reads, directly or through its reference."""
    if "reference" in stage.inputs:
        return _calibration(plan, plan.stages[stage.inputs["reference"].location])
    params = plan.stages[stage.inputs["importance"].location].params
    assert isinstance(params, ImportanceParameters)
    return params.calibration


def gpus_of_profile(resources: Resources) -> Gpus | None:
    """Return the GPUs of a kind of stage; None if it has none or the profile doesn't say how much memory they have."""
    return gpus_of(resources) if resources.gpus and resources.gpu_memory_gib else None


def gpus_of(resources: Resources) -> Gpus:
    """Return the GPUs of a kind of stage, one for each rank."""
    return Gpus(
        nodes=resources.nodes,
        per_node=resources.tasks_per_node,
        memory=(resources.gpu_memory_gib or 0.0) * GIB,
    )


def placed_job(job: Job, dims: Dimensions, gpus: Gpus, runtime: RuntimeConfig) -> tuple[Job, Gpus]:
    """Return a job as it will run, and the GPUs that hold one copy of the model: one GPU if each has whole weights."""
    if isinstance(job, Train):  # on GPUs of unknown memory in the way that takes least
        way = place(job, dims, gpus, runtime.sharding)
        return dataclasses.replace(job, checkpointing=way.checkpointing), copy_of(way, gpus)
    if isinstance(job, Evaluate) and runtime.sharding != "zero3":
        small = dims.parameters * job.itemsize <= WEIGHTS_SHARE * gpus.memory
        if runtime.sharding == "replicate" or small:
            return job, dataclasses.replace(gpus, nodes=1, per_node=1)
    return job, gpus
