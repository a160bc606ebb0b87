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
        most: way -> peak bytes on the device that came that way or are about to leave by it; and of pinned memory.
    """

    def __init__(self):
        self.copied = {TO_DEVICE: [], TO_HOST: [], WEIGHTS: []}
        self.most = Counter()
        self.pinned = Counter()
        self._now = Counter()

    def to_device(self, tensor):
        return _Late(self, TO_DEVICE, tensor)

    def to_host(self, tensor):
        return _Late(self, TO_HOST, tensor)

    def weights(self, reader, number):
        weights = reader.weights(number, lambda tensor, dtype: tensor.to(dtype).clone())
        size = sum(tensor.nbytes for tensor in weights.values())
        self.copied[WEIGHTS].append(size)
        for tensor in weights.values():
            self.alive(WEIGHTS, tensor)
        return Arrived(weights)

    def alive(self, way, tensor):
        """Count a tensor of the device for as long as it lives."""
        self.take(way, tensor.nbytes)
        weakref.finalize(tensor.untyped_storage(), self.give, way, tensor.nbytes)

    def take(self, way, size):
        self._now[way] += size
        self.most[way] = max(self.most[way], self._now[way])

    def give(self, way, size):
        self._now[way] -= size

    @property
    def on_the_way(self):
        """Return the pinned bytes that are still in use."""
        return {way: size for way, size in self._now.items() if way.startswith("pinned") and size}


class _Late:
    def __init__(self, lanes, way, tensor):
        self._lanes, self._way, self._source = lanes, way, tensor
        lanes.copied[way].append(tensor.nbytes)
        self._pinned = 1 << (tensor.nbytes - 1).bit_length()
        lanes.take(f"pinned {way}", self._pinned)
        if way == TO_DEVICE:
            self._target = torch.empty_like(tensor).fill_(float("nan"))
            lanes.alive(way, self._target)
        else:
            lanes.take(way, tensor.nbytes)

    def wait(self):
        if self._way == TO_DEVICE:
            target, self._target = self._target, None
            target.copy_(self._source)
            return target
        result = self._source.clone()
        self.settle()
        return result

    def settle(self):
        if self._pinned:
            self._lanes.give(f"pinned {self._way}", self._pinned)
            if self._way == TO_HOST:
                self._lanes.give(self._way, self._source.nbytes)
        self._pinned, self._source, self._target = 0, None, None


class Arrived:
    """Weights that have arrived as soon as they are on their way."""

    def __init__(self, weights):
        self._weights = weights

    def wait(self):
        weights, self._weights = self._weights, None
        return weights

    def settle(self):
        self._weights = None


class PlainLanes:
    """``Lanes`` to a device on which every copy is waited for."""

    def __init__(self, device):
        self._device = device

    def to_device(self, tensor):
        return Arrived(tensor.to(self._device))

    def to_host(self, tensor):
        return Arrived(tensor.cpu())

    def weights(self, reader, number):
        return Arrived(reader.weights(number, lambda tensor, dtype: tensor.to(self._device, dtype)))


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
