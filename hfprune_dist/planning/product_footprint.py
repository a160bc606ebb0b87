"""Memory of a layer whose neurons' weights are multiplied with their gradients (``core.coupled_products``)."""

from __future__ import annotations

from hfprune_dist.core.memory_limits import ACCELERATOR_BYTES
from hfprune_dist.planning.dimensions import Dimensions

FLOAT32 = 4


def product_bytes(dims: Dimensions, windows: int, tokens: int, itemsize: int) -> int:
    """Bytes while a micro-batch's gradients are made, the same on any number of ranks, since only scores travel.

    Gradients at the outputs of three linear layers wait for one another. Of a window what is as wide as the model is in
    float32, and of a portion of neurons two products and gradients at their outputs; float32 itself is not copied.
    """
    copied = FLOAT32 if itemsize < FLOAT32 else 0
    waiting = windows * tokens * (2 * dims.intermediate_size + dims.hidden_size) * itemsize
    neurons = min(dims.intermediate_size, ACCELERATOR_BYTES // (2 * FLOAT32 * dims.hidden_size))
    portion = neurons * (2 * FLOAT32 * dims.hidden_size + copied * tokens)
    return waiting + 3 * tokens * dims.hidden_size * copied + portion
