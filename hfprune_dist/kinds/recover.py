"""Recover: LoRA fine-tuning on instruction pairs.

Inputs: ``model``, and ``instructions`` where the pairs are in a file.
"""

from __future__ import annotations

from typing import ClassVar

from hfprune_dist.config.section import Dtype
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.kinds.memory import Planned, StageParameters
from hfprune_dist.kinds.training import Train


class RecoverParameters(StageParameters):
    """Settings of fine-tuning on instruction pairs."""

    dtype_setting: ClassVar[str | None] = "recovery.dtype"
    batch_setting: ClassVar[str] = "recovery.micro_batch_size"

    recovery: RecoveryConfig
    seed: int

    @property
    def tokenizes(self) -> bool:
        return True

    @property
    def compute_dtype(self) -> Dtype:
        return self.recovery.dtype

    def job(self, planned: Planned) -> Train:
        return Train.of(self.recovery, self.recovery.sequence_length, distills=False)

    def allows(self, rows: int) -> bool:
        """Ranks share the rows of an optimizer step evenly."""
        return self.recovery.batch_size % rows == 0
