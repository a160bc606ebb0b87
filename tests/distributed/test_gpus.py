"""Every rank finds its own GPU under any binding by a launcher; two ranks on one GPU are named before NCCL refuses."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import Ranks

from hfprune_dist.distributed.gpus import claim_device, place_of, require_own_gpus
from hfprune_dist.errors import UserError


def claimed(monkeypatch, visible, local_rank):
    """Return the numbers of the GPU made current, of the GPU returned, and the one left in LOCAL_RANK."""
    current, environment = [], {"LOCAL_RANK": str(local_rank)}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: visible > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    device = claim_device(environment)
    return [*current, device.index, int(environment["LOCAL_RANK"])]


@settings(max_examples=30, deadline=None, derandomize=True)
@given(ranks=st.integers(1, 8), each=st.integers(1, 4), shown=st.sampled_from(["all", "own", "one"]))
def test_ranks_of_a_node_have_different_gpus_under_every_binding(ranks, each, shown):
    """A launcher shows a task all GPUs of its node, only its own (by environment variable or cgroup), or just one."""
    gpus = []
    with pytest.MonkeyPatch.context() as patch:
        for rank in range(ranks):
            visible = {
                "all": list(range(ranks * each)),
                "own": list(range(rank * each, (rank + 1) * each)),
                "one": [rank * each],
            }
            numbers = claimed(patch, len(visible[shown]), rank)
            assert len(set(numbers)) == 1
            gpus.append(visible[shown][numbers[0]])
    assert len(set(gpus)) == ranks


def test_without_a_gpu_nothing_is_claimed(monkeypatch):
    assert claimed(monkeypatch, 0, 3) == [None, 3]
    assert place_of(torch.device("cpu")) is None


@pytest.mark.parametrize(
    ("properties", "address"),
    [
        ({"pci_domain_id": 0, "pci_bus_id": 27, "uuid": "GPU-1"}, "0000:1b"),
        ({"uuid": "GPU-1"}, "GPU-1"),
    ],
)
def test_a_gpu_is_known_by_its_place_on_the_bus(monkeypatch, properties, address):
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(**properties))
    assert place_of(torch.device("cuda", 0))[1] == address


@pytest.mark.parametrize(
    ("places", "message"),
    [
        ([("n1", "0000:1b"), ("n1", "0000:1c"), ("n2", "0000:1b")], None),
        ([None, None, None], None),
        ([("n1", "0000:1b"), ("n2", "0000:1b"), ("n1", "0000:1b")], "ranks 0 and 2 are on one GPU, 0000:1b of node n1"),
    ],
)
def test_ranks_that_share_a_gpu_are_named_on_all_of_them(places, message):
    said = []

    def check(world):
        try:
            require_own_gpus(world, places[world.rank])
        except UserError as error:
            said.append(str(error))

    Ranks(3).run(check)
    assert len(said) == (3 if message else 0) and all(message in it and "MIG slices" in it for it in said)
