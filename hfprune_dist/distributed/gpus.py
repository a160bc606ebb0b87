"""The choice of a rank's GPU: one of its own, whatever the launcher lets it see."""

from __future__ import annotations

import socket
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch

from hfprune_dist.errors import UserError

if TYPE_CHECKING:
    from hfprune_dist.distributed.world import World

# A node, and an address that tells its GPUs apart.
Place = tuple[str, str]


def claim_device(environment: MutableMapping[str, str]) -> torch.device:
    """Return this rank's GPU, and make it the current one; the CPU if there is none.

    A launcher may show a rank all GPUs of the node, only its own, or one. Among those that it sees, it takes the one
    numbered by its local rank, modulo their count: in each case its own, as ``require_own_gpus`` checks.

    Args:
        environment: ``LOCAL_RANK`` becomes the GPU's number, which is how DeepSpeed and accelerate read it.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = int(environment.get("LOCAL_RANK", "0")) % torch.cuda.device_count()
    environment["LOCAL_RANK"] = str(index)
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def place_of(device: torch.device) -> Place | None:
    """Return the place of a GPU; None for a CPU."""
    if device.type != "cuda":
        return None
    gpu: Any = torch.cuda.get_device_properties(device)
    # Slices of one GPU share its bus address, by which NCCL tells GPUs apart. torch before 2.9 doesn't report it.
    address = f"{gpu.pci_domain_id:04x}:{gpu.pci_bus_id:02x}" if hasattr(gpu, "pci_bus_id") else str(gpu.uuid)
    return socket.gethostname(), address


def require_own_gpus(world: World, place: Place | None) -> None:
    """Check that no two ranks compute on the same GPU, which NCCL refuses; collective.

    Raises:
        UserError: naming the ranks and the GPU, on all ranks.
    """
    places = world.gather(place)
    for rank, found in enumerate(places):
        first = places.index(found)
        if found is not None and first != rank:
            node, address = found
            raise UserError(
                f"ranks {first} and {rank} are on one GPU, {address} of node {node}; NCCL refuses that, also where "
                "they are MIG slices of it: give each rank a GPU of its own, or use one rank"
            )
