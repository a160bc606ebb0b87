"""Weights of a checkpoint, read from its files one tensor at a time."""

from __future__ import annotations

from safetensors import safe_open
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.criteria import MlpLayer, SecondMoments


def read_tensor(checkpoint: Checkpoint, name: str) -> Tensor:
    """One tensor, in the dtype of the file, on the CPU."""
    with safe_open(checkpoint.path / checkpoint.tensors[name].file, framework="pt") as source:
        tensor: Tensor = source.get_tensor(name)
    return tensor


def mlp_layer(checkpoint: Checkpoint, layer: int, seed: int, moments: SecondMoments | None = None) -> MlpLayer:
    """A layer's MLP, as criteria see it."""
    family = checkpoint.family
    rows = [name for name in family.gate_up_tensors(layer) if name.endswith(".weight")]
    return MlpLayer(
        number=layer,
        intermediate_size=checkpoint.intermediate_size,
        seed=seed,
        read_rows=lambda: [read_tensor(checkpoint, name) for name in rows],
        read_column=lambda: read_tensor(checkpoint, family.down_tensor(layer)),
        moments=moments,
    )
