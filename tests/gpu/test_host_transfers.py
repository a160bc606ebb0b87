"""Copies made while a GPU computes have the bits of plain ones, and stay within the memory planned for them."""

import pytest
import torch
from lanes import PlainLanes
from ranks import SoloWorld
from refitting import checkpoint_in, refit, some_kept, weights_in, windows_of

from hfprune_dist.distributed import host_transfers
from hfprune_dist.distributed.host_transfers import HostTransfers
from hfprune_dist.models.single_layer import LayerReader

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
TOKENS, SIZE = 2048, 4096


def busy(weight_CC):
    """Keep the GPU busy for longer than a copy takes, so that copies and computations that don't wait are found out."""

    def compute(hidden_TC):
        for _ in range(8):
            hidden_TC = torch.tanh(hidden_TC @ weight_CC)
        return hidden_TC

    return compute


def test_states_have_the_bits_of_plain_copies():
    generator = torch.Generator().manual_seed(0)
    states = {
        index: torch.randn(TOKENS + index, SIZE, generator=generator).bfloat16() for index in range(24)
    }  # of different sizes, so that memory is reused at other addresses
    compute = busy(torch.randn(SIZE, SIZE, generator=generator).bfloat16().to(GPU) / 64)
    plain = {index: compute(hidden_TC.to(GPU)).cpu() for index, hidden_TC in states.items()}
    for _ in range(3):
        made = dict(HostTransfers(GPU).through(states.items(), compute))
        assert list(made) == list(plain) and all(torch.equal(made[index], plain[index]) for index in plain)
        assert not any(it.is_pinned() for it in made.values())


def test_two_micro_batches_each_way_are_on_the_gpu_at_a_time():
    states = {index: torch.randn(TOKENS, SIZE) for index in range(16)}
    micro_batch = TOKENS * SIZE * 4
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    for _ in HostTransfers(GPU).through(states.items(), torch.tanh):
        pass
    assert torch.cuda.max_memory_allocated(GPU) - before <= 4 * micro_batch
    assert torch.cuda.memory_allocated(GPU) == before


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_who_stops_early_leaves_nothing_on_its_way(taken):
    states = {index: torch.ones(TOKENS, SIZE) for index in range(8)}
    before = torch.cuda.memory_allocated(GPU)
    results = HostTransfers(GPU).through(states.items(), torch.tanh)
    for _ in range(taken):
        next(results)
    results.close()
    assert torch.cuda.memory_allocated(GPU) == before
    other = torch.zeros(TOKENS, SIZE, device=GPU)  # where a copy might still arrive
    torch.cuda.synchronize()
    assert not other.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_have_the_bits_of_those_read_one_by_one(tmp_path, dtype):
    """They are converted on the way."""
    reader = LayerReader(checkpoint_in(tmp_path / "model", layers=5), dtype, GPU)
    for number, layer in HostTransfers(GPU).layers(reader, range(5)):
        whole = reader.layer(number).state_dict()
        assert whole.keys() == layer.state_dict().keys()
        assert all(torch.equal(weight, whole[name]) for name, weight in layer.state_dict().items())
        del layer, whole


@pytest.mark.parametrize("method", ["dense", "layerwise", "block"])
def test_refits_have_the_bits_of_plain_copies(tmp_path, method, monkeypatch):
    checkpoint, kept = checkpoint_in(tmp_path / "model", "qwen3", layers=4), some_kept((0, 1, 3))
    options = {"world": SoloWorld(device=GPU), "windows_ST": windows_of(31, tokens=64), "dtype": torch.bfloat16}
    refit(method, checkpoint, kept, tmp_path / "ahead", **options)
    with monkeypatch.context() as patch:
        patch.setattr(host_transfers, "lanes_of", PlainLanes)
        refit(method, checkpoint, kept, tmp_path / "plain", **options)
    assert weights_in(tmp_path / "ahead") == weights_in(tmp_path / "plain")
