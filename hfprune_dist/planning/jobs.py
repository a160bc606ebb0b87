"""What stages ask of the machine, from their settings: the jobs whose memory and work ``footprint`` computes."""

from __future__ import annotations

from hfprune_dist.config.parameters import ImportanceParameters
from hfprune_dist.config.training import LoraTraining
from hfprune_dist.core.criteria import CRITERIA, losses_of
from hfprune_dist.planning.footprint import Importance, Train
from hfprune_dist.structures import KV_GROUPS

ITEMSIZE = {"float32": 4, "bfloat16": 2}


def importance_job(params: ImportanceParameters, checkpointing: bool) -> Importance:
    """The calibration pass of an importance stage.

    Args:
        checkpointing: whether activations are computed again in backward.
    """
    criteria = [CRITERIA[name] for name in params.criteria]
    losses = losses_of(criteria)
    return Importance(
        windows=params.calibration.micro_batch_size,
        tokens=params.calibration.sequence_length,
        losses=sum(loss.of == "dense" for loss in losses),
        student=any(loss.of == "student" for loss in losses),
        itemsize=ITEMSIZE[params.dtype],
        checkpointing=checkpointing,
        curvature=any(criterion.needs_moments for criterion in criteria),
        samples=params.calibration.samples,
        kv_groups=KV_GROUPS in params.structures,
    )


def training_job(settings: LoraTraining, tokens: int, distills: bool) -> Train:
    """LoRA training on rows of so many tokens."""
    return Train(
        rows=settings.micro_batch_size,
        tokens=tokens,
        rank=settings.rank,
        dropout=settings.dropout > 0,
        itemsize=ITEMSIZE[settings.dtype],
        distills=distills,
    )
