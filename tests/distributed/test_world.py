"""Every rank finds its own GPU under any binding by a launcher; two ranks on one GPU are named before NCCL refuses."""

import contextlib
import os
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import Ranks

from hfprune_dist.distributed import world as worlds_of_ranks
from hfprune_dist.distributed.world import World, claim_device, require_kernels, require_own_gpus, stay_near
from hfprune_dist.errors import UserError


def claimed(monkeypatch, visible, local_rank):
    """Return the numbers of the GPU made current, of the GPU returned, and the one left in LOCAL_RANK."""
    current, environment = [], {"LOCAL_RANK": str(local_rank)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    device = claim_device(environment)
    return [*current, device.index, int(environment["LOCAL_RANK"])]


@settings(max_examples=30)
@given(ranks=st.integers(1, 8), each=st.integers(1, 4), shown=st.sampled_from(["all", "own", "one"]))
def test_ranks_of_a_node_have_different_gpus_under_every_binding(ranks, each, shown):
    """A launcher shows a task all GPUs of its node, only its own (by environment variable or cgroup), or just one."""
    taken = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(ranks):
            visible = {
                "all": list(range(ranks * each)),
                "own": list(range(rank * each, (rank + 1) * each)),
                "one": [rank * each],
            }
            numbers = claimed(patch, len(visible[shown]), rank)
            assert len(set(numbers)) == 1
            taken.append(visible[shown][numbers[0]])
    assert len(set(taken)) == ranks


def test_gpus_that_torch_cannot_use_are_an_error_instead_of_a_run_on_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    told = r"GPUs \(2\) that torch can't use.* CUDA 13.0;"
    with pytest.raises(UserError, match=told):
        claimed(monkeypatch, 0, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert claimed(monkeypatch, 0, 3) == [None, 3]


@pytest.mark.parametrize(
    ("own", "built", "runs"),
    [
        ((9, 0), ["sm_80", "sm_90a"], True),
        ((8, 9), ["sm_75", "sm_80", "sm_90"], True),
        ((7, 0), ["sm_75", "sm_80", "compute_120"], False),
        ((12, 1), ["sm_90", "compute_100"], True),
        ((12, 0), ["sm_90"], False),
        ((9, 4), ["gfx942"], True),
    ],
)
def test_a_gpu_that_torch_has_no_kernels_for_is_named(monkeypatch, own, built, runs):
    for name, value in {"get_device_capability": own, "get_arch_list": built, "get_device_name": "a V100"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    with (
        contextlib.nullcontext() if runs else pytest.raises(UserError, match=r"no kernels for a V100 \(sm_\d+\), only")
    ):
        require_kernels(torch.device("cuda", 0))


@pytest.mark.parametrize(
    ("gpus", "message"),
    [("abc", None), ("aba", "ranks 0 and 2 are on one GPU, a of node "), ("abb", "ranks 1 and 2 are on one GPU, b ")],
)
def test_ranks_that_share_a_gpu_are_named(monkeypatch, gpus, message):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=gpus[device.index]))

    store = torch.distributed.HashStore()
    with pytest.raises(UserError, match=message) if message else contextlib.nullcontext():
        Ranks(3).run(lambda world: require_own_gpus(torch.device("cuda", world.rank), world.rank, 3, store))


@pytest.mark.parametrize(
    ("listed", "threads", "cores"),
    [
        ("0-3,8-11", 4, {2, 3, 8, 9}),
        ("0-3,8-11", 5, None),  # too few of its own are near
        ("12-15", 1, None),
        (None, 1, None),
    ],
)
def test_a_rank_stays_on_the_cores_near_its_gpu(monkeypatch, tmp_path, listed, threads, cores):
    bound, gpu = [], SimpleNamespace(pci_domain_id=0, pci_bus_id=0xAF, pci_device_id=5)
    if listed is not None:
        (tmp_path / "0000:af:05.0").mkdir()
        (tmp_path / "0000:af:05.0" / "local_cpulist").write_text(f"{listed}\n")
    with monkeypatch.context() as patch:
        patch.setattr(worlds_of_ranks, "PCI", tmp_path)
        patch.setattr(torch.cuda, "get_device_properties", lambda _device: gpu)
        patch.setattr(os, "sched_getaffinity", lambda _process: set(range(2, 10)))
        patch.setattr(os, "sched_setaffinity", lambda _process, near: bound.append(near))
        stay_near(torch.device("cuda", 1), threads)
    assert bound == ([] if cores is None else [cores])


@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}])
def test_a_rank_joins_with_its_own_gpu_and_memory_in_segments_that_grow(monkeypatch, own):
    joined, environment = {}, {"LOCAL_RANK": "1", "OMP_NUM_THREADS": str(torch.get_num_threads()), **own}
    store = torch.distributed.HashStore()
    with monkeypatch.context() as patch:
        answers = {"is_available": True, "device_count": 2, "set_device": None, "get_device_capability": (9, 0)}
        for name, value in {**answers, "get_arch_list": ["sm_90"]}.items():
            patch.setattr(torch.cuda, name, lambda *_, value=value: value)
        patch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=device.index))
        patch.setattr(
            worlds_of_ranks, "rendezvous", lambda *_, timeout: joined.update(met=timeout) or iter([(store, 0, 1)])
        )
        patch.setattr(torch.distributed, "init_process_group", lambda backend, **options: joined.update(options))
        patch.setattr(torch.distributed, "get_rank", lambda: 0)
        patch.setattr(torch.distributed, "get_world_size", lambda: 1)
        assert worlds_of_ranks.join_world(environment, 240).device == joined["device_id"] == torch.device("cuda", 1)
    segments = environment.get("PYTORCH_CUDA_ALLOC_CONF")
    assert joined["met"].seconds == 30 * 60 and joined["timeout"].seconds == 240 * 60, (
        "those that can't meet are told soon"
    )
    assert joined["store"] is store and segments == (None if own else "expandable_segments:True")


class RankOnGpu:
    """A rank of a world, with the GPU of its number."""

    def __init__(self, world):
        self.device, self.all_gather = torch.device("cuda", world.rank), world.all_gather


def test_the_most_memory_of_a_rank_is_told(monkeypatch):
    assert all(told > 2**20 for told in Ranks(3).run(lambda world: world.peak_memory()))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 100 + device.index)
    assert Ranks(3).run(lambda world: World.peak_memory(RankOnGpu(world))) == [102] * 3
