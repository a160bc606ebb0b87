"""What this process may use of its machine: the GPUs that it sees; cores and memory by affinity and control groups."""

from __future__ import annotations

import itertools
import math
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path

import psutil

DEVICES = Path("/dev")
CPU_INFO = Path("/proc/cpuinfo")
# What names a GPU in CUDA_VISIBLE_DEVICES; other words name none: NoDevFiles of older Slurm, void, none.
DEVICE = re.compile(r"\s*(\d|GPU-|MIG-)")
# Where control groups (of version 2) are mounted, and the file that names this process's own group.
GROUPS = Path("/sys/fs/cgroup")
MEMBERSHIP = Path("/proc/self/cgroup")


def count_gpus() -> int:
    """Return the number of GPUs that ranks may use: a job that asked for none can't open those of its node."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len(list(itertools.takewhile(DEVICE.match, visible.split(","))))  # as CUDA reads it
    return sum(map(_can_open, DEVICES.glob("nvidia[0-9]*")))


def _can_open(device: Path) -> bool:
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError:
        return False
    return True


def cpu_model() -> str:
    """Return the name of this machine's processor; its architecture if there is no name."""
    found = re.search("^model name\\s*: (.*)$", _text(CPU_INFO), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def threads_allowed(environment: Mapping[str, str]) -> int | None:
    """Return the first number in ``OMP_NUM_THREADS``; None if there is none, or if it is 0."""
    found = re.match(r"\s*(\d+)", environment.get("OMP_NUM_THREADS", ""))
    return (int(found[1]) or None) if found else None


def usable_cores() -> int:
    """Return the number of cores that this process may keep busy, at least 1."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(own, *map(_core_limit, _groups()))))


def available_memory() -> float:
    """Return the bytes of main memory that this process and the others of its control group may still take."""
    return min(float(psutil.virtual_memory().available), *map(_free_bytes, _groups()))


def _groups() -> list[Path]:
    """Return the folders of this process's control group and of all groups around it, each of which sets limits.

    A container may be told the path outside, where it sees no folder: then the root is its own group.
    """
    own = GROUPS / _text(MEMBERSHIP).strip().rpartition("::")[2].lstrip("/")
    return [folder for folder in (own, *own.parents) if folder.is_relative_to(GROUPS)]


def _core_limit(folder: Path) -> float:
    """Return a group's limit in cores: its quota of time in each period, of all cores together."""
    quota, _, period = _text(folder / "cpu.max").strip().partition(" ")
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf


def _free_bytes(folder: Path) -> float:
    """Return what a group has left of its memory, cached files included, which the kernel drops if it needs room."""
    limit, used = (_text(folder / name).strip() for name in ("memory.max", "memory.current"))
    cached = re.findall(r"^(?:in)?active_file (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
    is_limited = limit.isdigit() and used.isdigit()
    return max(0.0, float(int(limit) - int(used) + sum(map(int, cached)))) if is_limited else math.inf


def _text(file: Path) -> str:
    """Return the content of a file; empty if it can't be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
