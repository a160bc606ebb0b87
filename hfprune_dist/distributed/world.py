"""The process group of a stage, as an object that is passed in and never looked up.

A rank that fails leaves its reason and ends (``launch/stage/run.py``); whoever started the ranks
(``launch/local/warm.py``, srun) then ends the others, which may wait in a collective. So no rank tells others of its
errors.
"""

from __future__ import annotations

import contextlib
import datetime
import os
import re
import resource
import socket
import sys
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.rendezvous import rendezvous

from hfprune_dist.errors import UserError
from hfprune_dist.store.machine import count_gpus, threads_allowed, usable_cores

T = TypeVar("T")
# Ranks that can't reach each other give up after so long; collectives, which wait for others' work, take longer.
MEETING = datetime.timedelta(minutes=30)
# Where Linux tells about devices, by their addresses.
PCI = Path("/sys/bus/pci/devices")


@dataclass(frozen=True)
class World:
    """All ranks of one stage, ``local_size`` of them on this node, as seen from one, which computes on its ``device``:
    a GPU of its own, or the CPU.
    """

    rank: int
    size: int
    local_size: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def peak_memory(self) -> int:
        """Return the most memory that any one rank's process has used so far, in bytes: of tensors on its GPU if there
        is one, otherwise resident, with pages of mapped files. Collective.
        """
        used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        if self.device.type == "cuda":
            used = torch.cuda.max_memory_allocated(self.device)
        return max(self.all_gather(used))

    def barrier(self) -> None:
        """Wait until all ranks are here."""
        self.all_gather(None)

    def broadcast(self, value: T) -> T:
        """Return the value that rank 0 passed (any picklable object)."""
        box = [value]
        dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
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
        timeout_minutes: a collective that takes longer raises, so that a rank that hangs doesn't hang the job; so does
            waiting for all ranks to join, after ``MEETING`` at the latest.
        reproducible: whether what GPUs compute must have the same bits each time.

    Raises:
        UserError: if ranks would share a GPU, or torch has no kernels for it.
    """
    if reproducible and torch.cuda.is_available():
        compute_deterministically()
    device = claim_device(environment)
    threads = threads_allowed(environment) or usable_cores()
    if device.type == "cuda":
        require_kernels(device)
        stay_near(device, threads)
    torch.set_num_threads(threads)
    timeout = datetime.timedelta(minutes=timeout_minutes)
    store, rank, size = next(rendezvous("env://", timeout=min(timeout, MEETING)))
    store.set_timeout(timeout)
    gpu = device if device.type == "cuda" else None
    if gpu is not None:  # NCCL connects the ranks' GPUs at once, so those that share one are told before
        require_own_gpus(gpu, rank, size, store)
    backend = "gloo" if gpu is None else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size, device_id=gpu)
    local_size = int(environment.get("LOCAL_WORLD_SIZE", "1"))
    return World(dist.get_rank(), dist.get_world_size(), local_size, device)


def meeting_place(listener: socket.socket) -> object:
    """Let ranks meet at the address of a listening socket, for as long as the returned object lives."""
    host, port, *_ = listener.getsockname()
    fd = listener.detach()
    return dist.TCPStore(host, port, is_master=True, master_listen_fd=fd, wait_for_workers=False)  # type: ignore[attr-defined]


def leave_world() -> None:
    dist.destroy_process_group()


# The device of a rank: a GPU of its own, whatever the launcher lets it see, with the same bits each time.


def claim_device(environment: MutableMapping[str, str]) -> torch.device:
    """Return this rank's GPU, and make it the current one; the CPU if the machine has none.

    A launcher may show a rank all GPUs of the node, only its own, or one. Among those that it sees, it takes the one
    numbered by its local rank, modulo their count: in each case its own, as ``require_own_gpus`` checks. ``LOCAL_RANK``
    becomes the GPU's number, which is how DeepSpeed and accelerate read it.
    """
    require_usable_gpus()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(environment.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    environment["LOCAL_RANK"] = str(index)
    if "PYTORCH_ALLOC_CONF" not in environment:
        # Micro-batches differ in length: of memory in pieces of fixed sizes, some could not be used again.
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def stay_near(gpu: torch.device, threads: int) -> None:
    """Keep this process on the cores of its GPU's NUMA node, where memory for copies should lie, if there are enough of
    those that it may use for its threads.
    """
    properties: Any = torch.cuda.get_device_properties(gpu)
    with contextlib.suppress(AttributeError, OSError):  # an older torch, or a system that doesn't tell
        numbers = properties.pci_domain_id, properties.pci_bus_id, properties.pci_device_id
        listed = (PCI / "{:04x}:{:02x}:{:02x}.0".format(*numbers) / "local_cpulist").read_text(encoding="utf-8")
        ranges = [[int(core) for core in part.split("-")] for part in listed.strip().split(",") if part]
        near = {core for ends in ranges for core in range(ends[0], ends[-1] + 1)} & os.sched_getaffinity(0)
        if len(near) >= threads:
            os.sched_setaffinity(0, near)


def require_usable_gpus() -> None:
    """Refuse a machine with GPUs that torch can't use: all would be computed on its CPU, without a word."""
    count = count_gpus()
    if not count or torch.cuda.is_available():
        return
    built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
    raise UserError(
        f"this machine has GPUs ({count}) that torch can't use: torch {torch.__version__} {built}; install a torch "
        "built for a CUDA that the driver supports (nvidia-smi shows it) or a newer driver, or set "
        "CUDA_VISIBLE_DEVICES='' to compute on the CPU"
    )


def require_kernels(gpu: torch.device) -> None:
    """Refuse a GPU that torch sees, but has no kernels for: those of its generation, or what its driver compiles."""
    own, built = torch.cuda.get_device_capability(gpu), " ".join(torch.cuda.get_arch_list())
    kernels = [(kind, int(major), int(minor)) for kind, major, minor in re.findall(r"(sm|compute)_(\d+)(\d)", built)]
    if kernels and not any(
        (major, minor) <= own and (kind == "compute" or major == own[0]) for kind, major, minor in kernels
    ):
        raise UserError(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(gpu)} (sm_{own[0]}{own[1]}), "
            f"only for {built}; install a torch built for an older or newer CUDA, or use other GPUs"
        )


def require_own_gpus(device: torch.device, rank: int, size: int, store: Any) -> None:
    """Refuse, on all ranks, two that compute on the same GPU, as NCCL would; the ranks meet at a store."""
    gpu: Any = torch.cuda.get_device_properties(device)
    store.set(f"gpu {rank}", f"{gpu.uuid} {socket.gethostname()}")
    first_there: dict[str, int] = {}
    for other in range(size):
        uuid, node = store.get(f"gpu {other}").decode().split()
        if first_there.setdefault(uuid, other) != other:
            raise UserError(
                f"ranks {first_there[uuid]} and {other} are on one GPU, {uuid} of node {node}; NCCL refuses that: give "
                "each rank a GPU of its own, or use one rank"
            )


def compute_deterministically() -> None:
    """Make every GPU operation give the same bits each time, or raise; to be called before CUDA starts.

    This holds for GPUs of one model and one version of the libraries: others have other kernels. On CPUs, nothing needs
    to be done.
    """
    # Otherwise, cuBLAS may choose among kernels by the scratch memory that other streams leave it.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    deterministic: Any = torch.utils.deterministic
    deterministic.fill_uninitialized_memory = False  # a pass over each new tensor that we fill anyway
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward is not among the operations that raise
    # NVIDIA's containers ask by TORCH_ALLOW_TF32_CUBLAS_OVERRIDE for products of float32 with three digits.
    torch.set_float32_matmul_precision("highest")
    # Otherwise, cuBLAS may add up parts of a product of bfloat16 in bfloat16.
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions, which hybrids have
