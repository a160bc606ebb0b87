"""Hidden states between a GPU and main memory, where they wait for its next layer. Where the CPU computes, nothing is
copied.

They wait in pinned memory. Its copies are queued among the GPU's other work: each sees what was computed before it, and
the host waits for none of them. So on the host, nobody may read what ``to_host`` has returned.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Micro-batch of a rank -> its hidden states [windows, tokens, hidden_size] in main memory.
States = dict[int, Tensor]


def to_host(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy in main memory, for ``to_device`` alone."""
    if device.type != "cuda":
        return tensor
    if not tensor.is_cuda:
        return tensor.pin_memory()
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy of a whole tensor in main memory: of a part that isn't contiguous, the host would make a copy first."""
    return tensor.to(device, non_blocking=True)
