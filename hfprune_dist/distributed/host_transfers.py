"""Copies between main memory and a GPU that overlap with its computations. Where the CPU computes, nothing is copied.

What is needed next is on its way while the GPU works on what has arrived, and a result goes back while the next one is
computed. Hidden states go through pinned memory, with at most two on their way in each direction; weights are read and
copied by a thread.

Copies of hidden states have streams of their own, but use memory of the computing stream. Two rules keep memory from
being used twice at once: a copy begins only when the GPU has done the work queued before it, which may still use what
is now the copy's target; and both of its tensors are held until it is over, which the host waits for.
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from hfprune_dist.models.single_layer import LayerReader

K = TypeVar("K")
T = TypeVar("T")
U = TypeVar("U")
States = Iterable[tuple[int, Tensor]]
Weights = dict[str, Tensor]


def one_ahead(items: Iterable[tuple[K, T]], begin: Callable[[T], Callable[[], U]]) -> Iterator[tuple[K, U]]:
    """Yield what arrives for each item, in order, once the next item has been sent.

    However the iteration ends, nothing is on its way afterwards.

    Args:
        items: (key, item) pairs.
        begin: sends an item on its way, and returns a function that waits for what arrives.
    """
    coming: deque[tuple[K, Callable[[], U]]] = deque()
    try:
        for key, item in items:
            coming.append((key, begin(item)))
            del item
            if len(coming) == 2:
                yield _arrived(*coming.popleft())
        while coming:
            yield _arrived(*coming.popleft())
    finally:
        for _, wait in coming:
            with suppress(Exception):
                wait()


def _arrived(key: K, wait: Callable[[], U]) -> tuple[K, U]:
    return key, wait()


class Lanes(Protocol):
    """Ways between main memory and a device. Each sends something, and returns a function that waits for it."""

    def to_device(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Send a tensor from main memory to the device."""

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Send a tensor from the device to main memory."""

    def weights(self, reader: LayerReader, number: int) -> Callable[[], Weights]:
        """Read a layer's weights, and send them to the device."""


class HostTransfers:
    """Transfers, in a pass layer by layer, between main memory and the device that computes."""

    def __init__(self, device: torch.device) -> None:
        self._lanes = lanes_of(device)

    def to_device(self, states: States) -> Iterator[tuple[int, Tensor]]:
        """Move numbered tensors from main memory to the device, one after another."""
        yield from states if self._lanes is None else one_ahead(states, self._lanes.to_device)

    def to_host(self, states: States) -> Iterator[tuple[int, Tensor]]:
        """Move numbered tensors from the device to main memory, one by one; each arrives once the next is computed."""
        yield from states if self._lanes is None else one_ahead(states, self._lanes.to_host)

    def through(self, states: States, compute: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
        """Run a computation on the device for each tensor of main memory, and yield the results in main memory."""
        yield from self.to_host(self._computed(states, compute))

    def _computed(self, states: States, compute: Callable[[Tensor], Tensor]) -> Iterator[tuple[int, Tensor]]:
        for index, tensor in self.to_device(states):
            yield index, compute(tensor)
            del tensor  # or it would still be there when the one after the next is sent

    def layers(self, reader: LayerReader, numbers: Iterable[int]) -> Iterator[tuple[int, nn.Module]]:
        """Yield layers of a checkpoint with their numbers, one after another.

        A GPU holds two at a time, if the caller drops each layer before asking for the next.
        """
        if self._lanes is None:
            for number in numbers:
                yield number, reader.layer(number)
            return
        begin = partial(self._lanes.weights, reader)
        for number, weights in one_ahead(((it, it) for it in numbers), begin):
            yield number, reader.with_weights(number, weights)
            del weights


def lanes_of(device: torch.device) -> Lanes | None:
    """Return the lanes to a device; None for the CPU, whose memory is the main memory."""
    return CudaLanes(device) if device.type == "cuda" else None


class CudaLanes:
    """Lanes to a GPU that computes in its default stream."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._inward, self._outward, self._files = _streams(device)
        # Its thread ends with this object, and would use the first GPU if it weren't told which.
        self._reader = ThreadPoolExecutor(1, initializer=torch.cuda.set_device, initargs=(device,))

    def to_device(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See ``Lanes``."""
        pinned = tensor.contiguous().pin_memory()
        return self._copying(pinned, torch.empty_like(pinned, device=self._device), self._inward)

    def to_host(self, tensor: Tensor) -> Callable[[], Tensor]:
        """See ``Lanes``; what arrives may be kept, since it isn't the pinned memory."""
        copied = self._copying(tensor, torch.empty_like(tensor, device="cpu", pin_memory=True), self._outward)
        return lambda: copied().clone()

    def _copying(self, source: Tensor, target: Tensor, stream: torch.cuda.Stream) -> Callable[[], Tensor]:
        stream.wait_stream(self._computing)
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        over = stream.record_event()

        def wait(_held: Tensor = source) -> Tensor:
            over.synchronize()
            return target

        return wait

    def weights(self, reader: LayerReader, number: int) -> Callable[[], Weights]:
        """See ``Lanes``; weights are read in a thread, since files are slow and conversions take the CPU's time."""
        reading = self._reader.submit(reader.weights, number, self._placed)

        def wait() -> Weights:
            weights = reading.result()
            for tensor in weights.values():
                tensor.record_stream(self._computing)
            return weights

        return wait

    def _placed(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy a tensor of a file to the device, in a dtype; returns when it is there."""
        with torch.cuda.stream(self._files):
            return tensor.to(self._device, dtype)

    @property
    def _computing(self) -> torch.cuda.Stream:
        return torch.cuda.current_stream(self._device)


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream, torch.cuda.Stream]:
    """Return the streams of copies inward and outward, and of weights, the same for all lanes to a GPU.

    torch keeps the memory of freed weights for the stream that they were in: if each pass had its own, what earlier
    ones left would fill the GPU, and cuSOLVER and NCCL, which ask CUDA for memory, would find none.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device), torch.cuda.Stream(device)
