"""What ranks on this machine compute with, found without importing torch."""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from hfprune_dist.plan import Stage

CPU_INFO = Path("/proc/cpuinfo")
# Where a kind of stage has its compute dtype; a prune stage has the pass's, a reference that of who reads it.
SECTIONS = {
    "importance": "importance",
    "prune": "importance",
    "distill": "distillation",
    "recover": "recovery",
    "evaluate": "evaluation",
}


def count_gpus() -> int:
    """GPUs that ranks may use."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = [device.strip() for device in visible.split(",")]
        return len(list(itertools.takewhile(lambda it: it and not it.startswith("-"), devices)))  # as CUDA reads it
    driver = Path("/proc/driver/nvidia/gpus")
    return len(list(driver.iterdir())) if driver.is_dir() else 0


def threads_allowed() -> int | None:
    """``OMP_NUM_THREADS``, of which the first number counts here; None where it says nothing."""
    found = re.match(r"\s*(\d+)", os.environ.get("OMP_NUM_THREADS", ""))
    return (int(found[1]) or None) if found else None


def note_on_bfloat16(stages: Iterable[Stage]) -> str:
    """What to set where stages would multiply bfloat16 on a CPU that can't; empty where it is no matter."""
    if count_gpus() or not _bfloat16_is_slow():
        return ""
    computing = (it for it in stages if it.kind in SECTIONS)
    settings = sorted({f"--set {SECTIONS[it.kind]}.dtype=float32" for it in computing if "bfloat16" in _dtypes(it)})
    if not settings:
        return ""
    return f"this CPU has no instructions for bfloat16; float32 is several times as fast on it: {' '.join(settings)}"


def _bfloat16_is_slow() -> bool:
    """Whether this is an x86 without AVX-512, where torch multiplies bfloat16 number by number."""
    if not CPU_INFO.is_file():
        return False
    flags = next((line.split() for line in CPU_INFO.read_text().splitlines() if line.startswith("flags")), [])
    return "sse2" in flags and "avx512bw" not in flags


def _dtypes(stage: Stage) -> Iterator[object]:
    yield stage.params.get("dtype")
    yield stage.params.get(SECTIONS[stage.kind], {}).get("dtype")
