"""The device of a rank: a GPU of its own, whatever the launcher lets it see, with the same bits each time."""

from __future__ import annotations

import os
import socket
from collections.abc import MutableMapping
from typing import TYPE_CHECKING, Any

import torch

from hfprune_dist.errors import UserError
from hfprune_dist.store.machine import count_gpus, driver_version

if TYPE_CHECKING:
    from hfprune_dist.distributed.world import World


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


def require_own_gpus(world: World) -> None:
    """Check that no two ranks compute on the same GPU, which NCCL refuses; collective.

    Raises:
        UserError: naming the ranks and the GPU, on all ranks.
    """
    own = None
    if world.device.type == "cuda":
        gpu: Any = torch.cuda.get_device_properties(world.device)
        own = str(gpu.uuid), socket.gethostname()
    first_there: dict[str, int] = {}
    for rank, place in enumerate(world.all_gather(own)):
        if place is not None and first_there.setdefault(place[0], rank) != rank:
            raise UserError(
                f"ranks {first_there[place[0]]} and {rank} are on one GPU, {place[0]} of node {place[1]}; NCCL refuses "
                "that: give each rank a GPU of its own, or use one rank"
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
    torch.backends.cudnn.allow_tf32 = False  # torch's default for convolutions, which hybrids have
