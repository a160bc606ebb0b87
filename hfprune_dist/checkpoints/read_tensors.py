"""Weights of a checkpoint, read from its files one tensor at a time."""

from __future__ import annotations

import torch
from safetensors import safe_open
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.scores import MeanGradients, ScoredLayer, SecondMoments
from hfprune_dist.structures.units import Units


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor, in the dtype of the file, on the CPU."""
    with safe_open(checkpoint.path / checkpoint.tensors[name].file, framework="pt") as source:
        tensor: Tensor = source.get_tensor(name)
    return tensor


def dtype_of(checkpoint: Checkpoint, name: str) -> torch.dtype:
    """The dtype of a tensor in the checkpoint's files."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    return names[checkpoint.tensors[name].dtype]


def scored_layer(
    checkpoint: Checkpoint,
    units: Units,
    layer: int,
    seed: int,
    moments: SecondMoments | None = None,
    *,
    gradients: MeanGradients | None = None,
) -> ScoredLayer:
    """A layer's units of one kind, as criteria see them."""
    return ScoredLayer(
        number=layer,
        units=units.counts[layer],
        seed=seed,
        read_rows=lambda: [read_tensor(checkpoint, name) for name in units.row_weights(layer)],
        read_columns=lambda: read_tensor(checkpoint, units.output_weight(layer)),
        moments=moments,
        gradients=gradients,
    )
