"""The dtype of sums and losses over what a model computes: at least float32, and float64 for a model in float64."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the given dtype if it is wider."""
    return torch.promote_types(dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in its ``wide_dtype``; the tensor itself if it has that dtype already."""
    return tensor.to(wide_dtype(tensor.dtype))
