"""Rounding computed tensors to the dtype that a checkpoint's files have for them."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.read_tensors import dtype_of
from hfprune_dist.errors import UserError


def as_stored(checkpoint: Checkpoint, name: str, tensor: Tensor, *, like: str | None = None, otherwise: str) -> Tensor:
    """Round a tensor, of any shape and on any device, to the dtype of the checkpoint's files.

    Args:
        name: under which it will be written.
        like: name of the checkpoint's tensor whose dtype it gets; None: ``name``.
        otherwise: what the user can do instead of converting the model, for the message.

    Raises:
        UserError: if a value is too large for float16, the one dtype of files whose range is easily left, unless it was
            infinite before.
    """
    rounded = tensor.to(dtype_of(checkpoint, like or name))
    if rounded.dtype == torch.float16 and tensor.dtype != torch.float16:
        too_large = rounded.isinf() & tensor.isfinite()
        if too_large.any():
            largest, limit = float(tensor[too_large].abs().max()), torch.finfo(torch.float16).max
            raise UserError(
                f"{checkpoint.path}: the new {name} has values up to {largest:,.0f}, but float16, its dtype in this "
                f"checkpoint, ends at {limit:,.0f}; convert the dense model to bfloat16 (transformers' from_pretrained "
                f"with dtype=torch.bfloat16, then save_pretrained) and prune the result, or {otherwise}"
            )
    return rounded
