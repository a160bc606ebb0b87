"""Which job each stage does with the model that it runs, for estimates of memory, and on which GPUs."""

from __future__ import annotations

from hfprune_launch.slurm.profile import Resources

from hfprune_dist.config.parameters import (
    DistillParameters,
    EfficiencyParameters,
    EvaluateParameters,
    ImportanceParameters,
    LoraPruneParameters,
    Parameters,
    PruneParameters,
    RecoverParameters,
    ReferenceParameters,
)
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.config.texts import FIRST, CalibrationConfig, FidelityConfig, reference_role
from hfprune_dist.planning.memory import (
    GIB,
    ITEMSIZE,
    Calibration,
    Evaluate,
    Generate,
    Gpus,
    Job,
    LayerPass,
    Train,
)
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.stage import Stage
from hfprune_dist.structures import KV_GROUPS


def runs_a_model(params: Parameters) -> bool:
    """Return whether a stage needs GPU memory that is estimated."""
    return not isinstance(params, PruneParameters) or params.refit != "none" or params.allocation == "low_rank"


def job_of(plan: Plan, stage: Stage, runtime: RuntimeConfig) -> Job:
    """Return the job that a stage does with the model it runs."""
    match stage.params:
        case ImportanceParameters() as params:
            return Calibration.of(params, checkpointing=runtime.activation_checkpointing)
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
            positions = plan.dense_checkpoint(stage).max_positions
            return Evaluate.of(params, _held_out(plan, stage).sequence_length, positions)
        case EfficiencyParameters() as params:
            return Generate.of(params, plan.dense_checkpoint(stage))
    raise AssertionError(f"{stage.id} was planned by another version of the code")


def _reference(params: ReferenceParameters, plan: Plan, stage: Stage) -> LayerPass:
    text = params.text or _calibration(plan, stage)
    samples = text.windows if isinstance(text, FidelityConfig) else text.samples
    windows = min(params.micro_batch_size, samples)
    return LayerPass(windows, text.sequence_length, ITEMSIZE[params.dtype], samples=samples)


def _refit(params: PruneParameters, plan: Plan, stage: Stage) -> LayerPass:
    calibration, (dtype, windows) = _calibration(plan, stage), params.forward_pass()
    samples = calibration.samples * (1 + params.refit_copies)
    return LayerPass(
        batch=min(windows, samples),
        tokens=calibration.sequence_length,
        itemsize=ITEMSIZE[dtype],
        samples=samples,
        refit=params.refit,
        # A share of the model, taken from MLPs alone, leaves no more of each; where layers compete, all may stay.
        share_kept=1 - params.ratio if params.allocation == "uniform" else 1.0,
        kv_groups=KV_GROUPS in params.structures,
        searches=params.allocation in ("plain", "searched"),
        norms=params.refit_norms,
        low_rank=params.allocation == "low_rank",
    )


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
    """Return the GPUs of a kind of stage, one for each rank; of unknown memory if the profile doesn't say."""
    return Gpus(resources.nodes, resources.tasks_per_node, (resources.gpu_memory_gib or 0.0) * GIB)
