"""What this process may use of its machine, where its affinity or the control group of its job allows it less."""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

# What the driver of NVIDIA's GPUs tells about itself and them.
NVIDIA = Path("/proc/driver/nvidia")
DEVICES = Path("/dev")
# What names a GPU in CUDA_VISIBLE_DEVICES; other words name none: NoDevFiles of older Slurm, void, none.
DEVICE = re.compile(r"\s*(\d|GPU-|MIG-)")
# Of each version of control groups: the files with the limit of memory and with what is used, and what the names of
# statistics begin with.
MEMORY_FILES = (
    ("memory.max", "memory.current", ""),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
)


@dataclass(frozen=True)
class ControlGroups:
    """The control groups that this process is in, of either version.

    Attributes:
        root: where they are mounted.
        membership: the file that names the process's own group in each hierarchy.
    """

    root: Path = Path("/sys/fs/cgroup")
    membership: Path = Path("/proc/self/cgroup")

    def cores(self) -> float:
        """Return how many cores' time the groups allow; infinite without a limit."""
        return min(map(_core_limit, self._folders("cpu")), default=math.inf)

    def free_bytes(self) -> float:
        """Return how much more memory the groups allow; infinite without a limit."""
        return min(map(_free_bytes, self._folders("memory")), default=math.inf)

    def _folders(self, controller: str) -> Iterator[Path]:
        """Yield the folders of a controller's own group and of all groups around it, each of which sets limits.

        A container may be told the path outside, where it sees no folder: then the root is its own group.
        """
        for line in _text(self.membership).splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers and controller not in controllers.split(","):
                continue
            mount = self.root / controller if controllers else self.root  # version 2 names no controllers
            own = mount / path.lstrip("/")
            yield from (folder for folder in (own, *own.parents) if folder.is_relative_to(mount))


HERE = ControlGroups()


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


def driver_version() -> str | None:
    """Return the version of NVIDIA's driver; None if it isn't loaded."""
    found = re.search(r"\d+\.[\d.]*\d", _text(NVIDIA / "version"))
    return found and found[0]


def threads_allowed(environment: Mapping[str, str]) -> int | None:
    """Return the first number in ``OMP_NUM_THREADS``; None if there is none, or if it is 0."""
    found = re.match(r"\s*(\d+)", environment.get("OMP_NUM_THREADS", ""))
    return (int(found[1]) or None) if found else None


def usable_cores(groups: ControlGroups = HERE) -> int:
    """Return the number of cores that this process may keep busy, at least 1."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, math.ceil(min(own, groups.cores())))


def available_memory(groups: ControlGroups = HERE) -> float:
    """Return the bytes of main memory that this process and the others of its control group may still take."""
    return min(float(psutil.virtual_memory().available), groups.free_bytes())


def _core_limit(folder: Path) -> float:
    """Return a group's limit in cores: its quota of time in each period, of all cores together."""
    of_version_1 = (_text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us"))
    quota, period = _text(folder / "cpu.max").split() or (text.strip() for text in of_version_1)
    return int(quota) / int(period) if quota.isdigit() and period.isdigit() else math.inf


def _free_bytes(folder: Path) -> float:
    """Return what a group has left of its memory, cached files included, which the kernel drops if it needs room."""
    for limit, used, prefix in MEMORY_FILES:
        numbers = _text(folder / limit).strip(), _text(folder / used).strip()
        if all(number.isdigit() for number in numbers):
            most, taken = map(int, numbers)
            return max(0.0, float(most - taken + _cached_bytes(folder, prefix)))
    return math.inf


def _cached_bytes(folder: Path, prefix: str) -> int:
    statistics = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines())
    return sum(int(statistics.get(f"{prefix}{kind}_file", 0)) for kind in ("inactive", "active"))


def _text(file: Path) -> str:
    """Return the content of a file; empty if it can't be read."""
    try:
        return file.read_text(encoding="utf-8")
    except OSError:
        return ""
