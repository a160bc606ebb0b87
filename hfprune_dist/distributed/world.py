"""The process group of a stage, as an object that is passed in and never looked up.

A rank that fails leaves its reason and ends (``launch/stage/run.py``); whoever started the ranks
(``launch/stage/warm.py``, srun) then ends the others, which may wait in a collective. So no rank tells others of its
errors.
"""

from __future__ import annotations

import datetime
import resource
import socket
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

from hfprune_dist.distributed.devices import claim_device, compute_deterministically, require_own_gpus
from hfprune_dist.store.machine import threads_allowed, usable_cores

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """All ranks of one stage, as seen from one of them.

    Attributes:
        rank: number of this one, from 0 on.
        size: number of all of them.
        local_size: number of those on this rank's node.
        device: where this rank computes: a GPU of its own, or the CPU.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def peak_memory(self) -> dict[str, int | None]:
        """Return the most memory that any one rank's process has used so far, for a manifest. Collective.

        What earlier attempts used is not known; resident memory includes pages of mapped files.

        Returns:
            ``peak_memory_bytes``: of tensors on its GPU if there is one, otherwise resident; ``peak_reserved_bytes``:
            what torch's allocator kept for them, which other processes can't have; None without a GPU.
        """
        used, reserved = _max_resident_bytes(), 0
        if self.device.type == "cuda":
            used, reserved = (
                most(self.device) for most in (torch.cuda.max_memory_allocated, torch.cuda.max_memory_reserved)
            )
        everywhere = self.all_gather((used, reserved))
        used, reserved = (max(values) for values in zip(*everywhere, strict=True))
        return {"peak_memory_bytes": used, "peak_reserved_bytes": reserved or None}

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_gather(None)

    def broadcast(self, value: T, source: int = 0) -> T:
        """Return the value that rank ``source`` passed (any picklable object)."""
        box = [value]
        dist.broadcast_object_list(box, src=source, device=torch.device("cpu"))
        return box[0]

    def on_rank0(self, work: Callable[[], T]) -> T:
        """Run work on rank 0 only, and return its result (any picklable object) on every rank; the others wait.

        If it raises there, the launcher ends the others.
        """
        return self.broadcast(work() if self.is_first else None)  # type: ignore[return-value]

    def broadcast_tensor(self, tensor: torch.Tensor, source: int) -> None:
        """Overwrite a tensor of every rank, on the CPU or the device, with that of rank ``source``."""
        dist.broadcast(tensor, src=source)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Overwrite a tensor of every rank with the sum over all ranks: the same bits on each."""
        dist.all_reduce(tensor)

    def reduce(self, tensor: torch.Tensor, owner: int) -> None:
        """Overwrite a tensor of rank ``owner`` with the sum over all ranks, and the others' with anything."""
        dist.reduce(tensor, dst=owner)

    def all_gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on every rank (any picklable objects)."""
        boxes: list[T] = [value] * self.size
        dist.all_gather_object(boxes, value)
        return boxes


def join_world(environment: MutableMapping[str, str], timeout_minutes: int, *, reproducible: bool = False) -> World:
    """Join the process group that the launcher's environment describes (RANK, WORLD_SIZE, MASTER_ADDR, ...).

    CPU tensors travel over gloo in any case, so that float64 sums and decisions never depend on the accelerator.

    Args:
        timeout_minutes: a collective that takes longer raises, so that a rank that hangs doesn't hang the job.
        reproducible: whether what GPUs compute must have the same bits each time.

    Raises:
        UserError: if ranks would share a GPU.
    """
    if reproducible and torch.cuda.is_available():
        compute_deterministically()
    device = claim_device(environment)
    torch.set_num_threads(threads_allowed(environment) or usable_cores())
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(minutes=timeout_minutes)
    )
    world = World(
        rank=dist.get_rank(),
        size=dist.get_world_size(),
        local_size=int(environment.get("LOCAL_WORLD_SIZE", "1")),
        device=device,
    )
    require_own_gpus(world)
    return world


def meeting_place(listener: socket.socket) -> object:
    """Let ranks meet at the address of a listening socket, for as long as the returned object lives."""
    host, port = listener.getsockname()
    fd = listener.detach()
    return dist.TCPStore(host, port, is_master=True, master_listen_fd=fd, wait_for_workers=False)  # type: ignore[attr-defined]


def _max_resident_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def leave_world() -> None:
    """Close the process group."""
    dist.destroy_process_group()
