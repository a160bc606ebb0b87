"""Copies from the host to a device, for which the host does not wait."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device of what the host has made."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor
