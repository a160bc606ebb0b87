"""Rows of a large matrix in portions that a core's cache holds, for work of many passes over the same elements."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# Of one thread's portion. A second-level cache holds it together with a result of the same size.
CACHE_BYTES = 2**19


def row_blocks(matrix_NV: Tensor, scratch_bytes: int = 4) -> Iterator[slice]:
    """Slices over a matrix's rows; one for all of them on an accelerator, where launches cost more than passes.

    Args:
        scratch_bytes: of what is made on the way of each element.
    """
    rows, columns = matrix_NV.shape
    portion = CACHE_BYTES * torch.get_num_threads() // (scratch_bytes * columns)
    block = max(1, portion) if matrix_NV.device.type == "cpu" else rows
    for start in range(0, rows, block):
        yield slice(start, min(start + block, rows))
