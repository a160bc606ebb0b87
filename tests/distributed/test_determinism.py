"""GPUs give the same bits each time: flags are set before CUDA starts."""

import os

import pytest
import torch
from hfprune_launch.stage import run as stage_run

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.distributed import world as worlds
from hfprune_dist.store.artifacts import Store

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


class StoppedError(Exception):
    """Raised instead of starting CUDA or a process group."""


@pytest.fixture
def flags(monkeypatch):
    """The flags as a rank sees them; they are restored afterwards."""
    monkeypatch.delenv(WORKSPACE, raising=False)
    torch.set_float32_matmul_precision("high")  # as NVIDIA's containers set it
    yield lambda: (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.backends.cuda.cudnn_sdp_enabled(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        os.environ.get(WORKSPACE),
    )
    os.environ.pop(WORKSPACE, None)
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True


AS_THEY_WERE = (False, False, True, True, "high", True, True, None)


@pytest.mark.parametrize(
    ("on_gpu", "reproducible", "expected"),
    [
        (True, True, (True, False, False, False, "highest", False, False, ":4096:8")),
        (True, False, AS_THEY_WERE),
        (False, True, AS_THEY_WERE),
    ],
)
def test_flags_are_set_before_cuda_starts_and_only_where_they_are_needed(
    monkeypatch, flags, on_gpu, reproducible, expected
):
    seen = []

    def start(*_, **__):
        seen.append(flags())
        raise StoppedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", start)
    monkeypatch.setattr(worlds, "rendezvous", start)
    threads = torch.get_num_threads()
    with pytest.raises(StoppedError):
        worlds.join_world({"LOCAL_RANK": "0", "OMP_NUM_THREADS": str(threads)}, 1, reproducible=reproducible)
    assert seen == [expected]


def test_stages_whose_bits_are_promised_ask_for_them(monkeypatch, tmp_path):
    asked = {}

    def join(_environment, _minutes, *, reproducible):
        asked[kind] = reproducible
        raise StoppedError

    monkeypatch.setattr(worlds, "join_world", join)
    for kind in KINDS:
        with pytest.raises(StoppedError):
            stage_run.run_stage(Store(tmp_path).handle(f"{kind}/0123456789abcdef"), None, None)
    assert {kind for kind, reproducible in asked.items() if reproducible} == {"importance", "reference", "prune"}
    assert asked.keys() == KINDS.keys()
