"""The GPUs, cores and CPU features of this machine, found without importing torch."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.store.machine import count_gpus, cpu_info, cpu_model, threads_allowed, usable_cores
from hfprune_dist.store.stage import Stage

# What the driver of NVIDIA's GPUs tells about them.
NVIDIA = Path("/proc/driver/nvidia")


def device_here(runtime: RuntimeConfig) -> str:
    """Return the device of a stage with one rank: this machine's kind of GPU, or its CPU and number of threads."""
    if not count_gpus():
        return f"{cpu_model()}, threads: {threads_of_a_rank(runtime, 1)}"
    facts = "\n".join(file.read_text(encoding="utf-8") for file in NVIDIA.glob("gpus/*/information"))
    models = {model.strip() for model in re.findall("^Model:(.*)$", facts, re.MULTILINE)}
    return ", ".join(sorted(models)) or "a GPU"


def threads_of_a_rank(runtime: RuntimeConfig, ranks: int) -> int:
    """Return the CPU threads of each rank of a stage that has ``ranks`` ranks on this machine."""
    return runtime.threads_per_rank or threads_allowed(os.environ) or max(1, usable_cores() // ranks)


def ranks_here(runtime: RuntimeConfig) -> int:
    """Return the number of ranks of a stage on this machine: at most one for each GPU, if there are any."""
    gpus = count_gpus()
    return min(runtime.ranks or gpus or 1, gpus or sys.maxsize)


def note_on_bfloat16(stages: Iterable[Stage]) -> str:
    """Return which settings to change if stages would use bfloat16 on a CPU that is slow at it; empty if none."""
    flags = cpu_info("flags").split()
    # On an x86 without AVX-512, torch multiplies bfloat16 numbers one at a time.
    is_slow = not count_gpus() and "sse2" in flags and "avx512bw" not in flags
    if not is_slow or all(stage.params.compute_dtype != "bfloat16" for stage in stages):
        return ""
    sections = "importance", "distillation", "recovery", "evaluation", "efficiency"
    settings = " ".join(f"--set {section}.dtype=float32" for section in sections)
    return f"this CPU has no instructions for bfloat16; float32 is several times as fast on it: {settings}"
