"""The job of an importance stage, from its settings."""

from __future__ import annotations

from hfprune_dist.config.parameters import ImportanceParameters
from hfprune_dist.core.criteria import CRITERIA, losses_of
from hfprune_dist.planning.gpu_needs import ITEMSIZE
from hfprune_dist.planning.importance_footprint import Importance
from hfprune_dist.structures import KV_GROUPS


def importance_job(params: ImportanceParameters, checkpointing: bool) -> Importance:
    """The calibration pass of an importance stage.

    Args:
        checkpointing: whether activations are recomputed in backward.
    """
    criteria = [CRITERIA[name] for name in params.criteria]
    losses = losses_of(criteria)
    return Importance(
        windows=min(params.calibration.micro_batch_size, params.calibration.samples),
        tokens=params.calibration.sequence_length,
        losses=sum(loss.of == "dense" for loss in losses),
        student=any(loss.of == "student" for loss in losses),
        itemsize=ITEMSIZE[params.dtype],
        checkpointing=checkpointing,
        curvature=any(criterion.needs_moments for criterion in criteria),
        samples=params.calibration.samples,
        kv_groups=KV_GROUPS in params.structures,
        weight_gradients=any(criterion.needs_weight_gradients for criterion in criteria),
        coupled_products=any(criterion.summed == "coupled_product" for criterion in criteria),
    )
