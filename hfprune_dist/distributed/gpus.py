"""The choice of a rank's GPU: one of its own, whatever the launcher lets it see."""

from __future__ import annotations

import socket
from collections.abc import MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from hfprune_dist.errors import UserError
from hfprune_dist.store.machine import count_gpus, driver_version

if TYPE_CHECKING:
    from hfprune_dist.distributed.world import World

BOOT = Path("/proc/sys/kernel/random/boot_id")


class Place(NamedTuple):
    """The place of a GPU.

    Attributes:
        machine: identifies the running system that the GPU is in, which nodes of one name don't share, and containers
            on one node do.
        address: tells the machine's GPUs apart.
        node: name of the node, for people; one machine may have several.
    """

    machine: str
    address: str
    node: str


def claim_device(environment: MutableMapping[str, str]) -> torch.device:
    """Return this rank's GPU, and make it the current one; the CPU if the machine has none.

    A launcher may show a rank all GPUs of the node, only its own, or one. Among those that it sees, it takes the one
    numbered by its local rank, modulo their count: in each case its own, as ``require_own_gpus`` checks.

    Args:
        environment: ``LOCAL_RANK`` becomes the GPU's number, which is how DeepSpeed and accelerate read it.

    Raises:
        UserError: if there are GPUs that torch can't use.
    """
    require_usable_gpus()
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(environment.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    environment["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def require_usable_gpus() -> None:
    """Check that torch can use the machine's GPUs if it has some: all would be computed on its CPU, without a word.

    Raises:
        UserError: naming the CUDA that torch was built for, and the driver.
    """
    count = count_gpus()
    if not count or torch.cuda.is_available():
        return
    built = f"was built for CUDA {torch.version.cuda}" if torch.version.cuda else "was built without CUDA"
    raise UserError(
        f"this machine has GPUs ({count}) that torch can't use: torch {torch.__version__} {built}, and the driver is "
        f"{driver_version() or 'not loaded'}; install a torch built for a CUDA that this driver supports (nvidia-smi "
        "shows it) or a newer driver, or set CUDA_VISIBLE_DEVICES='' to compute on the CPU"
    )


def place_of(device: torch.device) -> Place | None:
    """Return the place of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    gpu: Any = torch.cuda.get_device_properties(device)
    # Slices of one GPU share its address, by which NCCL tells GPUs apart. torch before 2.9 doesn't report it.
    address = str(gpu.uuid)
    if hasattr(gpu, "pci_bus_id"):
        address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}:{gpu.pci_device_id:02x}"
    node = socket.gethostname()
    return Place(_machine() or node, address, node)


def _machine() -> str | None:
    """Return the id that Linux draws when it boots, which NCCL looks at too; None if there is none to be read."""
    try:
        return BOOT.read_text(encoding="ascii").strip() or None
    except OSError:
        return None


def require_own_gpus(world: World, place: Place | None) -> None:
    """Check that no two ranks compute on the same GPU, which NCCL refuses; collective.

    Raises:
        UserError: naming the ranks and the GPU, on all ranks.
    """
    first_there: dict[tuple[str, str], int] = {}
    for rank, found in enumerate(world.all_gather(place)):
        if found is None:
            continue
        first = first_there.setdefault((found.machine, found.address), rank)
        if first != rank:
            raise UserError(
                f"ranks {first} and {rank} are on one GPU, {found.address} of node {found.node}; NCCL refuses that, "
                "also where they are MIG slices of it: give each rank a GPU of its own, or use one rank"
            )
