"""Memory to multiply a layer's weights with their gradients (``core.weight_products``), the same on any number of
ranks, since only scores are exchanged.

Held in float32: a window's values that are as wide as the model; and for a portion of rows, products with their other
operands and gradients at the rows' outputs. Values that are float32 already are not copied.
"""

from __future__ import annotations

from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES
from hfprune_dist.planning.dimensions import Dimensions
from hfprune_dist.planning.gpu_needs import ITEMSIZE

FLOAT32 = ITEMSIZE["float32"]  # bytes


def coupled_bytes(dims: Dimensions, windows: int, tokens: int, itemsize: int) -> int:
    """Bytes of a micro-batch's coupled products; gradients at the outputs of all linear layers are kept meanwhile."""
    waiting = windows * tokens * (dims.row_projections * dims.intermediate_size + dims.hidden_size) * itemsize
    return waiting + dims.mlp_matrices * _copied(dims, tokens, itemsize) + _portion(dims, tokens, itemsize)


def _copied(dims: Dimensions, tokens: int, itemsize: int) -> int:
    return tokens * dims.hidden_size * (FLOAT32 if itemsize < FLOAT32 else 0)


def _portion(dims: Dimensions, tokens: int, itemsize: int) -> int:
    rows = min(dims.intermediate_size, ACCELERATOR_BYTES // (2 * FLOAT32 * dims.hidden_size))
    return rows * (2 * FLOAT32 * dims.hidden_size + tokens * (FLOAT32 if itemsize < FLOAT32 else 0))
