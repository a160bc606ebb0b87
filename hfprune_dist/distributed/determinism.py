"""The same bits from every run on GPUs, where the fastest kernels add up in an order that changes from run to run.

Stages whose results are promised to have the same bits compute so. On CPUs nothing is needed.
"""

from __future__ import annotations

import os
from typing import Any

import torch

# Kinds of stages that promise it. Recovery and evaluation are free to use the fastest kernels.
REPRODUCIBLE = frozenset({"importance", "reference", "prune"})


def compute_deterministically() -> None:
    """Let every operation on a GPU have the same bits each time, or raise; before CUDA starts.

    GPUs of one model and one version of the libraries are meant: others have other kernels.
    """
    # Else cuBLAS may choose among kernels by the scratch memory that other streams leave it.
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    torch.use_deterministic_algorithms(True)
    filling: Any = torch.utils.deterministic
    filling.fill_uninitialized_memory = False  # a pass over each new tensor that we fill anyway
    torch.backends.cuda.enable_cudnn_sdp(False)  # its backward is not among the operations that raise
