"""Work on a large matrix in portions of rows that fit a cache, for operations that read elements several times."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES, CACHE_BYTES


def row_blocks(matrix_NV: Tensor, scratch_bytes: int = 4) -> Iterator[slice]:
    """Slices over a matrix's rows, of at least one row each.

    Args:
        scratch_bytes: of what is made on the way of each element.
    """
    rows, columns = matrix_NV.shape
    on_cpu = matrix_NV.device.type == "cpu"
    portion = CACHE_BYTES * torch.get_num_threads() if on_cpu else ACCELERATOR_BYTES
    block = max(1, portion // (scratch_bytes * columns))
    for start in range(0, rows, block):
        yield slice(start, min(start + block, rows))
