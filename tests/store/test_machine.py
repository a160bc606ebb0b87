"""Cores and memory that a process may use, by its affinity and by (faked) control groups."""

import math
import os

import psutil
import pytest
from hfprune_launch.local.backend import threads_of_a_rank
from worlds import Ranks

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.distributed import frozen_model
from hfprune_dist.store import machine
from hfprune_dist.store.machine import available_memory, usable_cores

GIB = 2**30
CACHED = f"anon 5\ninactive_file {GIB}\nactive_file {2 * GIB}\n"
# The membership of a process, files below the root, and the cores and memory that they leave, of 4 cores and 4 GiB.
CASES = {
    "no groups": ("", {}, 4, 4 * GIB),
    "the job's": (
        "0::/job/task\n",
        {
            "job/cpu.max": "250000 100000\n",
            "job/task/cpu.max": "max 100000\n",
            "job/memory.max": f"{8 * GIB}\n",
            "job/memory.current": f"{9 * GIB}\n",
            "job/memory.stat": CACHED,
            "job/task/memory.max": "max\n",
            "job/task/memory.current": f"{GIB}\n",
        },
        3,
        2 * GIB,
    ),
    "a container's, seen as the root": (
        "0::/\n",
        {"cpu.max": "50000 100000\n", "memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"},
        1,
        0,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_tightest_limit_of_all_groups_around_a_process_counts(tmp_path, monkeypatch, case):
    membership, files, cores, memory = CASES[case]
    (tmp_path / "membership").write_text(membership)
    for name, text in files.items():
        (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "root" / name).write_text(text)
    monkeypatch.setattr(machine, "GROUPS", tmp_path / "root")
    monkeypatch.setattr(machine, "MEMBERSHIP", tmp_path / "membership")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 3, 5, 7}, raising=False)
    machines = psutil.virtual_memory()._replace(available=4 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machines)
    assert (usable_cores(), available_memory()) == (cores, memory)


def test_ranks_take_the_cores_and_the_memory_that_they_may_use(monkeypatch):
    """The machine has more of both."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {8, 9, 10, 11}, raising=False)
    monkeypatch.setattr(machine, "_core_limit", lambda _: math.inf)
    monkeypatch.setattr(machine, "_free_bytes", lambda _: 3.0)
    assert [threads_of_a_rank(RuntimeConfig(), ranks) for ranks in (1, 2, 3, 7)] == [4, 2, 1, 1]
    assert Ranks(3).run(frozen_model.free_bytes) == [1.0, 1.0, 1.0]
