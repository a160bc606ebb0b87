"""Copies between main memory and a GPU that overlap with its computations. Where the CPU computes, nothing is copied.

What is needed next is on its way while the GPU works on what has arrived, and a result goes back while the next one is
computed. Every tensor is copied once, through pinned memory, with at most two on their way in each direction.

Copies of hidden states have streams of their own, but use memory of the computing stream. Two rules keep memory from
being used twice at once. A copy begins only when the GPU has done the work queued before it, which may still use what
is now the copy's target. And both of its tensors are held until it is over, or until the next computation is set to
wait for it. Weights use memory of their own stream, whose copies begin as soon as a file is read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Protocol, TypeVar

import torch
from torch import Tensor, nn

from hfprune_dist.core.memory_limits import PINNED_BYTES
from hfprune_dist.models.single_layer import LayerReader

K = TypeVar("K")
T = TypeVar("T")
U = TypeVar("U")
U_co = TypeVar("U_co", covariant=True)
States = Iterable[tuple[int, Tensor]]
Weights = dict[str, Tensor]


class InFlight(Protocol[U_co]):
    """A transfer that may still be on its way."""

    def wait(self) -> U_co:
        """Return what arrives, for use in computations from now on; to be called once."""

    def settle(self) -> None:
        """Block until the transfer is over; the memory that it took is free afterwards."""


def one_ahead(items: Iterable[tuple[K, T]], begin: Callable[[T], InFlight[U]]) -> Iterator[tuple[K, U]]:
    """Yield what arrives for each item, in order, once the next item has been sent.

    However the iteration ends, nothing is on its way afterwards.

    Args:
        items: (key, item) pairs. At most two are in flight: an item is taken once the one two places before it has
            been handed out.
        begin: sends an item on its way.
    """
    handed_out: InFlight[U] | None = None
    coming: tuple[K, InFlight[U]] | None = None
    try:
        for key, item in items:
            if handed_out is not None:
                handed_out.settle()
                handed_out = None
            arriving, coming = coming, (key, begin(item))
            del item
            if arriving is not None:
                handed_out = arriving[1]
                yield arriving[0], handed_out.wait()
        if coming is not None:
            yield coming[0], coming[1].wait()
    finally:
        for flight in (handed_out, coming and coming[1]):
            if flight is not None:
                flight.settle()


class Lanes(Protocol):
    """Ways between main memory and a device."""

    def to_device(self, tensor: Tensor) -> InFlight[Tensor]:
        """Send a tensor from main memory to the device."""

    def to_host(self, tensor: Tensor) -> InFlight[Tensor]:
        """Send a tensor from the device to main memory."""

    def weights(self, reader: LayerReader, number: int) -> InFlight[Weights]:
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

    def to_device(self, tensor: Tensor) -> InFlight[Tensor]:
        """See ``Lanes``."""
        pinned = tensor.contiguous().pin_memory()
        target = torch.empty_like(pinned, device=self._device)
        self._inward.wait_stream(_computing(self._device))
        return _ToDevice(pinned, target, self._inward)

    def to_host(self, tensor: Tensor) -> InFlight[Tensor]:
        """See ``Lanes``."""
        pinned = torch.empty_like(tensor, device="cpu", pin_memory=True)
        self._outward.wait_stream(_computing(self._device))
        return _ToHost(tensor, pinned, self._outward)

    def weights(self, reader: LayerReader, number: int) -> InFlight[Weights]:
        """See ``Lanes``; weights are read in a thread, since files are slow and conversions take the CPU's time."""
        return _Reading(self._reader.submit(reader.weights, number, self._placed), self._device)

    def _placed(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """Copy a tensor of a file to the device, in a dtype, portion by portion."""
        with torch.cuda.stream(self._files):
            placed = torch.empty(tensor.shape, dtype=dtype, device=self._device)
            portions = (it.reshape(-1).split(PINNED_BYTES // dtype.itemsize) for it in (tensor, placed))
            pairs = ((None, pair) for pair in zip(*portions, strict=True))
            for _ in one_ahead(pairs, lambda it: _Arrival(it[0].to(dtype).pin_memory(), it[1], self._files)):
                pass
        return placed


@functools.cache
def _streams(device: torch.device) -> tuple[torch.cuda.Stream, torch.cuda.Stream, torch.cuda.Stream]:
    """Return the streams of copies inward and outward, and of weights, the same for all lanes to a GPU.

    torch keeps the memory of freed weights for the stream that they were in: if each pass had its own, what earlier
    ones left would fill the GPU, and cuSOLVER and NCCL, which ask CUDA for memory, would find none.
    """
    return torch.cuda.Stream(device), torch.cuda.Stream(device), torch.cuda.Stream(device)


def _computing(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.current_stream(device)


class _Copy:
    """A copy in some stream, to or from pinned memory."""

    def __init__(self, source: Tensor, target: Tensor, stream: torch.cuda.Stream) -> None:
        self._tensors: tuple[Tensor, Tensor] | None = source, target
        with torch.cuda.stream(stream):
            target.copy_(source, non_blocking=True)
        self._over = stream.record_event()

    def settle(self) -> None:
        self._over.synchronize()
        self._tensors = None

    def _target(self) -> Tensor:
        assert self._tensors is not None, "settled before it was asked for"
        return self._tensors[1]


class _ToDevice(_Copy):
    def wait(self) -> Tensor:
        target = self._target()
        _computing(target.device).wait_event(self._over)
        self._tensors = None  # torch keeps the pinned memory until it has been read
        return target


class _ToHost(_Copy):
    def wait(self) -> Tensor:
        """Return a copy that may be kept, rather than the pinned memory."""
        target = self._target()
        self.settle()
        return target.clone()


class _Arrival(_Copy):
    def wait(self) -> None:
        self.settle()


class _Reading:
    """Weights that a thread reads. Computations needn't wait for them once they are here, and share their memory."""

    def __init__(self, reading: Future[Weights], device: torch.device) -> None:
        self._future: Future[Weights] | None = reading
        self._device = device

    def wait(self) -> Weights:
        assert self._future is not None, "settled before it was asked for"
        weights = self._future.result()
        self._future = None
        for tensor in weights.values():
            tensor.record_stream(_computing(self._device))
        return weights

    def settle(self) -> None:
        if self._future is not None and not self._future.cancel():
            self._future.exception()  # waits until it is over
        self._future = None
