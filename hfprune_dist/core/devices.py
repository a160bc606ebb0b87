"""Copies between the host and a device, for which the host does not wait until it must."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a GPU without waiting; one that is on a GPU, or meant for a CPU, is returned as it is."""
    is_away = device.type == "cuda" and not tensor.is_cuda
    return tensor.pin_memory().to(device, non_blocking=True) if is_away else tensor


def to_host(tensor: Tensor) -> Tensor:
    """A copy in main memory, queued behind a GPU's other work: ``send`` may take it at once, the host has to wait."""
    if not tensor.is_cuda:
        return tensor
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)


def fetch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous and in main memory; waits for a GPU, so that the host can read them at once."""
    fetched = {name: to_host(tensor.contiguous()) for name, tensor in tensors.items()}
    if any(tensor.is_cuda for tensor in tensors.values()):
        torch.cuda.current_stream().synchronize()
    return fetched
