"""The state of a LoRA training, from which any number of ranks can resume.

It holds only what changes: the LoRA weights and AdamW's two moments, float32 and whole, the losses and the masks. Rows,
learning rate and dropout follow from the optimizer step.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from hfprune_dist.checkpoints.tensor_files import load_tensors, save_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")

LossLine = dict[str, float | int]


@dataclass(frozen=True)
class Snapshot:
    """The state after optimizer step ``step``.

    Attributes:
        tensors: LoRA parameters, whole, float32, under their names in a ``PeftModel``; AdamW's moments, as
            ``<parameter>.exp_avg`` and ``<parameter>.exp_avg_sq``; and ``UnitMasks.state``.
        losses: one line per step so far.
    """

    step: int = 0
    tensors: dict[str, Tensor] = field(default_factory=dict)
    losses: list[LossLine] = field(default_factory=list)

    @property
    def weights(self) -> dict[str, Tensor]:
        """The LoRA parameters alone."""
        return {
            name: tensor for name, tensor in self.tensors.items() if ".lora_" in name and not name.endswith(MOMENTS)
        }

    def save(self, file: Path) -> None:
        """Replace an earlier snapshot by this one."""
        texts = {"step": str(self.step), "losses": json.dumps(self.losses, allow_nan=False)}
        save_tensors(self.tensors, file, texts)

    @classmethod
    def read(cls, file: Path) -> Snapshot:
        tensors, texts = load_tensors(file)
        return cls(int(texts["step"]), tensors, json.loads(texts["losses"]))
