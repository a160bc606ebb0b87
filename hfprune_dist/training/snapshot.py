"""The state of a LoRA training, from which any number of ranks can resume.

It holds only what changes: the LoRA weights and AdamW's two moments, float32 and whole, the losses and the masks. Rows,
learning rate and dropout follow from the optimizer step.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, nn

from hfprune_dist.checkpoints.tensor_files import load_tensors, save_tensors
from hfprune_dist.distributed.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")

LossLine = dict[str, float | int]
# A LoRA parameter and its name in a ``PeftModel``; in one order on all ranks.
Named = tuple[str, Any]


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


def gathered_state(parameters: Sequence[Named], world: World) -> dict[str, Tensor]:
    """The weights and moments of a sharded optimizer, parameter by parameter, on rank 0 alone; collective."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in parameters:
        whole = {name: safe_get_full_fp32_param(parameter)}
        whole |= {f"{name}.{moment}": safe_get_full_optimizer_state(parameter, moment) for moment in MOMENTS}
        if world.is_first:
            tensors |= {key: tensor.cpu() for key, tensor in whole.items()}
    return tensors


def restore_state(parameters: Sequence[Named], start: Snapshot, rank: int) -> None:
    """Put a snapshot's float32 weights and moments into the sharded optimizer of a model that is ready to train."""
    zero_optimizer = parameters[0][1]._z3_optimizer
    for flat in zero_optimizer.fp32_partitioned_groups_flat:
        # torch's AdamW would make its state only in its first step.
        moments = {moment: torch.zeros_like(flat) for moment in MOMENTS}
        zero_optimizer.optimizer.state[flat] = {"step": torch.tensor(float(start.step)), **moments}
    for name, parameter in parameters:
        safe_set_local_fp32_param(parameter, _shard(start.tensors[name], parameter, rank))
        for moment in MOMENTS:
            shard = _shard(start.tensors[f"{name}.{moment}"], parameter, rank)
            safe_set_local_optimizer_state(parameter, shard, moment)


def _shard(whole: Tensor, parameter: Any, rank: int) -> Tensor:
    """The part [shard_size] of a parameter-shaped tensor that ZeRO-3 keeps on a rank, padded with zeros."""
    size = parameter.ds_tensor.numel()
    part = whole.flatten()[rank * size : (rank + 1) * size]
    return nn.functional.pad(part, (0, size - part.numel()))
