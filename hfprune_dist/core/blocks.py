"""Cache-sized blocks of a large matrix's rows, for operations that read each element several times."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES, CACHE_BYTES


def row_blocks(matrix_NV: Tensor, scratch_bytes: int = 4) -> Iterator[slice]:
    """Yield slices over a matrix's rows, each of at least one row.

    Args:
        scratch_bytes: bytes of temporary results per element.
    """
    rows, columns = matrix_NV.shape
    on_cpu = matrix_NV.device.type == "cpu"
    portion = CACHE_BYTES * torch.get_num_threads() if on_cpu else ACCELERATOR_BYTES
    block = max(1, portion // (scratch_bytes * columns))
    for start in range(0, rows, block):
        yield slice(start, min(start + block, rows))
