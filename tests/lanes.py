"""Fake lanes: a GPU's transfers imitated on the CPU, with every copy late and counted.

A copy is made only when it is waited for, so that changing or dropping a tensor too early is found out.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from hfprune_dist.distributed import host_transfers

TO_DEVICE, TO_HOST, WEIGHTS = "to device", "to host", "weights"


class FakeLanes:
    """``Lanes`` to a device in main memory.

    Attributes:
        copied: way -> bytes of every tensor that was copied that way.
        most: way -> peak bytes on the device that came that way.
    """

    def __init__(self):
        self.copied = {TO_DEVICE: [], TO_HOST: [], WEIGHTS: []}
        self.most = Counter()
        self._now = Counter()

    def to_device(self, tensor):
        self.copied[TO_DEVICE].append(tensor.nbytes)
        target = [self._alive(TO_DEVICE, torch.empty_like(tensor).fill_(float("nan")))]
        return lambda: target.pop().copy_(tensor)

    def to_host(self, tensor):
        self.copied[TO_HOST].append(tensor.nbytes)
        return lambda: tensor.clone()

    def weights(self, reader, number):
        weights = reader.weights(number, lambda tensor, dtype: self._alive(WEIGHTS, tensor.to(dtype).clone()))
        self.copied[WEIGHTS].append(sum(tensor.nbytes for tensor in weights.values()))
        coming = [weights]
        del weights
        return coming.pop

    def _alive(self, way, tensor):
        """Count a tensor of the device for as long as it lives."""
        self._now[way] += tensor.nbytes
        self.most[way] = max(self.most[way], self._now[way])
        weakref.finalize(tensor.untyped_storage(), self._now.subtract, {way: tensor.nbytes})
        return tensor


class PlainLanes:
    """``Lanes`` to a device on which every copy is waited for."""

    def __init__(self, device):
        self._device = device

    def to_device(self, tensor):
        return lambda: tensor.to(self._device)

    def to_host(self, tensor):
        return tensor.cpu

    def weights(self, reader, number):
        return lambda: reader.weights(number, lambda tensor, dtype: tensor.to(self._device, dtype))


@contextmanager
def lanes() -> Iterator[list[FakeLanes]]:
    """Let all passes use fake lanes, and yield those that are made."""
    made: list[FakeLanes] = []

    def make(_device):
        made.append(FakeLanes())
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(host_transfers, "lanes_of", make)
        yield made
