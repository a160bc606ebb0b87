"""The same bits from every run on GPUs, whose fastest kernels add up in an order that changes from run to run.

Stages that promise results with the same bits compute this way. On CPUs, nothing needs to be done.
"""

from __future__ import annotations

import os
from typing import Any

import torch


def compute_deterministically() -> None:
    """Make every GPU operation give the same bits each time, or raise; to be called before CUDA starts.

    This holds for GPUs of one model and one version of the libraries: others have other kernels.
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
