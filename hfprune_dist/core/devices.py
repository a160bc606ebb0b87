"""Copies between the host and a device: the host does not wait for those that it sends, and fetches many at once."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device of what the host has made; a tensor that is there already stays as it is."""
    is_away = device.type == "cuda" and not tensor.is_cuda
    return tensor.pin_memory().to(device, non_blocking=True) if is_away else tensor


def fetch(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, contiguous, in main memory."""
    fetched = {name: tensor.contiguous() for name, tensor in tensors.items()}
    on_device = [name for name, tensor in fetched.items() if tensor.is_cuda]
    for name in on_device:
        there = fetched[name]
        fetched[name] = torch.empty(there.shape, dtype=there.dtype, pin_memory=True).copy_(there, non_blocking=True)
    if on_device:
        torch.cuda.current_stream(tensors[on_device[0]].device).synchronize()
    return fetched
