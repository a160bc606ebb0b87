"""Requirements of tests marked ``gpu`` or ``multi_gpu``; without torch, since every run of the suite imports this.

They run wherever there are GPUs. Some need more than the demo's small models, given by environment variables:

HFPRUNE_GPU_MODEL        folder of a model of about 7B parameters, e.g. Llama-2-7B
HFPRUNE_GPU_LARGE_MODEL  folder of one of about 70B
HFPRUNE_GPU_PROFILE      a profile (slurm/profiles) of a cluster with two nodes of GPUs, in a folder that all nodes see
"""

from __future__ import annotations

import os

import pytest

from hfprune_dist.store.machine import count_gpus

MODEL, LARGE_MODEL, PROFILE = "HFPRUNE_GPU_MODEL", "HFPRUNE_GPU_LARGE_MODEL", "HFPRUNE_GPU_PROFILE"


def lacking(item: pytest.Item) -> str:
    """Return what a test requires of GPUs that this machine doesn't have; empty if nothing is lacking."""
    several = item.get_closest_marker("multi_gpu")
    if several is not None and several.kwargs.get("nodes"):
        return "" if PROFILE in os.environ else f"needs two nodes with GPUs: {PROFILE} names no profile"
    needed = 2 if several is not None else int(item.get_closest_marker("gpu") is not None)
    if needed and count_gpus() < needed:
        return f"needs {needed} NVIDIA GPU{'s' * (needed > 1)}; this machine has {count_gpus()}"
    return ""
