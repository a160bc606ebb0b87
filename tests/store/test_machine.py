"""Cores and memory that a process may use, by its affinity and by (faked) control groups of both versions."""

import math
import os

import psutil
import pytest
from hfprune_launch.local.hardware import threads_of_a_rank
from worlds import Ranks

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.distributed import frozen_model, world
from hfprune_dist.store.machine import ControlGroups, available_memory, usable_cores

GIB = 2**30
CACHED = f"anon 5\ninactive_file {GIB}\nactive_file {2 * GIB}\ntotal_inactive_file 7\n"
CACHED_1 = f"inactive_file 7\ntotal_inactive_file {GIB}\ntotal_active_file {2 * GIB}\n"
# The membership of a process, files below the root, and the cores and memory that they leave.
CASES = {
    "no groups": ("", {}, math.inf, math.inf),
    "no limits": ("0::/a\n", {"a/cpu.max": "max 100000\n", "a/memory.max": "max\n"}, math.inf, math.inf),
    "its own": (
        "0::/job/task\n",
        {
            "job/task/cpu.max": "150000 100000\n",
            "job/task/memory.max": f"{8 * GIB}\n",
            "job/task/memory.current": f"{6 * GIB}\n",
            "job/task/memory.stat": CACHED,
        },
        1.5,
        5 * GIB,
    ),
    "the job's": (
        "0::/job/task\n",
        {
            "job/cpu.max": "300000 100000\n",
            "job/task/cpu.max": "max 100000\n",
            "job/memory.max": f"{8 * GIB}\n",
            "job/memory.current": f"{6 * GIB}\n",
            "job/task/memory.max": "max\n",
            "job/task/memory.current": f"{GIB}\n",
        },
        3.0,
        2 * GIB,
    ),
    "a container's, seen as the root": (
        "0::/\n",
        {"cpu.max": "50000 100000\n", "memory.max": f"{GIB}\n", "memory.current": f"{2 * GIB}\n"},
        0.5,
        0,
    ),
    "version 1": (
        "5:memory:/slurm/job_7\n4:cpuset:/slurm\n3:cpu,cpuacct:/slurm/job_7\n1:name=systemd:/\n0::/\n",
        {
            "cpu/slurm/job_7/cpu.cfs_quota_us": "-1\n",
            "cpu/slurm/job_7/cpu.cfs_period_us": "100000\n",
            "cpu/slurm/cpu.cfs_quota_us": "200000\n",
            "cpu/slurm/cpu.cfs_period_us": "100000\n",
            "memory/slurm/job_7/memory.limit_in_bytes": f"{8 * GIB}\n",
            "memory/slurm/job_7/memory.usage_in_bytes": f"{6 * GIB}\n",
            "memory/slurm/job_7/memory.stat": CACHED_1,
            "memory/memory.limit_in_bytes": "9223372036854771712\n",
            "memory/memory.usage_in_bytes": "1\n",
        },
        2.0,
        5 * GIB,
    ),
    "version 1, a container that is told the path outside": (
        "5:memory:/docker/0a1b\n3:cpu,cpuacct:/docker/0a1b\n",
        {"memory/memory.limit_in_bytes": f"{GIB}\n", "memory/memory.usage_in_bytes": "0\n"},
        math.inf,
        GIB,
    ),
}


@pytest.fixture
def groups(tmp_path):
    def build(membership, files):
        (tmp_path / "membership").write_text(membership)
        for name, text in files.items():
            (tmp_path / "root" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "root" / name).write_text(text)
        return ControlGroups(tmp_path / "root", tmp_path / "membership")

    return build


@pytest.mark.parametrize("case", CASES)
def test_the_tightest_limit_of_all_groups_around_a_process_counts(groups, monkeypatch, case):
    membership, files, cores, memory = CASES[case]
    faked = groups(membership, files)
    assert (faked.cores(), faked.free_bytes()) == (cores, memory)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {1, 3, 5, 7}, raising=False)
    assert usable_cores(faked) == {math.inf: 4, 3.0: 3, 2.0: 2, 1.5: 2, 0.5: 1}[cores]
    machines = psutil.virtual_memory()._replace(available=4 * GIB)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: machines)
    assert available_memory(faked) == min(memory, 4 * GIB)


def test_ranks_take_the_cores_and_the_memory_that_they_may_use(monkeypatch):
    """The machine has more of both."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _pid: {8, 9, 10, 11}, raising=False)
    monkeypatch.setattr(ControlGroups, "cores", lambda _: math.inf)
    monkeypatch.setattr(ControlGroups, "free_bytes", lambda _: 3.0)
    assert [threads_of_a_rank(RuntimeConfig(), ranks) for ranks in (1, 2, 3, 7)] == [4, 2, 1, 1]
    assert Ranks(3).run(frozen_model.free_bytes) == [1.0, 1.0, 1.0]
    threads = []
    monkeypatch.setattr(world.torch, "set_num_threads", threads.append)
    monkeypatch.setattr(world.dist, "init_process_group", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        world.join_world({"LOCAL_RANK": "0"}, 1)
    assert threads == [4]
