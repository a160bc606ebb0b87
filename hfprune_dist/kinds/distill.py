"""Distill: a pruned model learns its dense original's output distribution, on the windows that it was pruned with.

Inputs: ``model``, the pruned model, and ``reference``, the dense model's hidden states.
"""

from __future__ import annotations

from typing import ClassVar

from hfprune_dist.config.section import Dtype
from hfprune_dist.config.training import DistillationConfig
from hfprune_dist.kinds.importance import calibration_of
from hfprune_dist.kinds.memory import Planned, StageParameters
from hfprune_dist.kinds.training import Train


class DistillParameters(StageParameters):
    """Settings of a distillation. ``passes``: number of passes over the calibration windows."""

    dtype_setting: ClassVar[str | None] = "distillation.dtype"
    batch_setting: ClassVar[str] = "distillation.micro_batch_size"

    distillation: DistillationConfig
    passes: int
    seed: int

    @property
    def compute_dtype(self) -> Dtype:
        return self.distillation.dtype

    def job(self, planned: Planned) -> Train:
        tokens = calibration_of(planned, "reference", "importance").sequence_length
        return Train.of(self.distillation, tokens, distills=True)

    def allows(self, rows: int) -> bool:
        return rows <= self.distillation.batch_size
