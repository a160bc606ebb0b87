"""Work in portions that fit a cache, and in dtypes that sums need."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES, CACHE_BYTES

# Whether matrix products of bfloat16 may have float32 results: on GPUs, from torch 2.8 on.
HAS_WIDE_PRODUCTS = "dtype" in torch.ops.aten.mm.overloads()


def row_blocks(matrix_NV: Tensor, scratch_bytes: int = 4) -> Iterator[slice]:
    """Yield slices over a matrix's rows whose scratch, so many bytes per element, fits a cache; at least a row each."""
    rows, columns = matrix_NV.shape
    on_cpu = matrix_NV.device.type == "cpu"
    portion = CACHE_BYTES * torch.get_num_threads() if on_cpu else ACCELERATOR_BYTES
    block = max(1, portion // (scratch_bytes * columns))
    for start in range(0, rows, block):
        yield slice(start, min(start + block, rows))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float32, or the given dtype if it is wider: that of sums and losses over what a model computes."""
    return torch.promote_types(dtype, torch.float32)


def widened(tensor: Tensor) -> Tensor:
    """Return a tensor in its ``wide_dtype``; the tensor itself if it has that dtype already."""
    return tensor.to(wide_dtype(tensor.dtype))


def wide_product(a_NK: Tensor, b_NM: Tensor) -> Tensor:
    """Return the sum of a b^T over the rows, in their ``wide_dtype`` [K, M].

    Products of two bfloat16 numbers are exact in float32, in which tensor cores add them up. For them, an entry of a
    float32 ``a_NK`` is split into two bfloat16 numbers, whose sum is right to 2**-17 of its size.
    """
    if not (HAS_WIDE_PRODUCTS and a_NK.is_cuda and b_NM.dtype == torch.bfloat16):
        return widened(a_NK).T @ widened(b_NM)
    rounded_NK = a_NK.bfloat16()
    product_KM = torch.mm(rounded_NK.T, b_NM, out_dtype=torch.float32)
    if a_NK.dtype != torch.bfloat16:
        product_KM += torch.mm((a_NK - rounded_NK).bfloat16().T, b_NM, out_dtype=torch.float32)
    return product_KM
