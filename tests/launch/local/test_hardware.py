"""This machine's device, GPUs and threads."""

import pytest
from hfprune_launch.local import backend
from hfprune_launch.local.backend import device_here

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.store import machine
from hfprune_dist.store.machine import threads_allowed


@pytest.mark.parametrize(
    ("visible", "gpus"),
    [("", 0), ("0, 2", 2), ("1,-1,0", 1), ("GPU-1f,MIG-2", 2), ("NoDevFiles", 0)],
)
def test_gpus_are_counted_as_cuda_does(monkeypatch, visible, gpus):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert machine.count_gpus() == gpus


@pytest.mark.parametrize(("visible", "asked", "ranks"), [("0", 3, 1), ("0,1", None, 2), ("", 3, 3), ("", None, 1)])
def test_each_rank_has_a_gpu_where_there_are_any(monkeypatch, visible, asked, ranks):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert backend.ranks_here(RuntimeConfig(ranks=asked)) == ranks


def test_threads_are_those_of_the_outermost_level():
    for value, threads in (("", None), ("0", None), ("3", 3), ("4,2", 4), ("x", None)):
        assert threads_allowed({"OMP_NUM_THREADS": value}) == threads


def test_the_device_of_one_rank_is_told_without_torch(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setattr(machine, "CPU_INFO", tmp_path / "cpuinfo")
    machine.CPU_INFO.write_text("processor\t: 0\nmodel name\t: A processor @ 2 GHz\n\nprocessor\t: 1\n")
    assert device_here(RuntimeConfig(threads_per_rank=3, ranks=2)) == "A processor @ 2 GHz, threads: 3"
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert device_here(RuntimeConfig()) == "A processor @ 2 GHz, threads: 5"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(backend, "NVIDIA", tmp_path)
    assert device_here(RuntimeConfig()) == "a GPU", "whose driver tells nothing"
    for number in range(2):
        (tmp_path / "gpus" / str(number)).mkdir(parents=True)
        (tmp_path / "gpus" / str(number) / "information").write_text("Model: \t\t NVIDIA A100\nIRQ: 7\n")
    assert device_here(RuntimeConfig()) == "NVIDIA A100"
