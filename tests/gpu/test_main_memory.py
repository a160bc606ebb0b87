"""Copies queued among a GPU's work have the bits of plain ones, and stay within the memory planned for them; norms."""

import pytest
import torch
from ranks import SoloWorld
from refitting import checkpoint_in, refit, some_kept, weights_in, windows_of
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hfprune_dist.core.devices import send, to_host
from hfprune_dist.models.memory_efficient_backward import replace_norms
from hfprune_dist.models.single_layer import LayerReader

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda", 0)
TOKENS, SIZE = 2048, 4096


def test_one_micro_batch_is_on_the_gpu_at_a_time():
    states = {index: torch.randn(TOKENS, SIZE) for index in range(16)}
    micro_batch = TOKENS * SIZE * 4
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(GPU)
    torch.cuda.reset_peak_memory_stats(GPU)
    for index in states:
        states[index] = to_host(torch.tanh(send(states[index], GPU)))
    assert torch.cuda.max_memory_allocated(GPU) - before <= 3 * micro_batch
    assert torch.cuda.memory_allocated(GPU) == before


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_have_the_bits_of_those_read_one_by_one(tmp_path, dtype):
    """They are converted on the way."""
    reader = LayerReader(checkpoint_in(tmp_path / "model", layers=5), dtype, GPU)
    for number, layer in reader.layers(range(5)):
        whole = reader.layer(number).state_dict()
        assert whole.keys() == layer.state_dict().keys()
        assert all(torch.equal(weight, whole[name]) for name, weight in layer.state_dict().items())
        del layer, whole


@pytest.mark.parametrize("method", ["dense", "layerwise", "block"])
def test_refits_have_the_same_bits_wherever_hidden_states_wait(tmp_path, method):
    checkpoint, kept = checkpoint_in(tmp_path / "model", "qwen3", layers=4), some_kept((0, 1, 3))
    options = {"world": SoloWorld(device=GPU), "windows_ST": windows_of(31, tokens=64), "dtype": torch.bfloat16}
    for stay in (True, False):
        refit(method, checkpoint, kept, tmp_path / str(stay), stay=stay, **options)
    assert weights_in(tmp_path / "True") == weights_in(tmp_path / "False")


def test_norms_compute_what_those_of_transformers_do():
    for trained in (True, False):
        norm, (leaf, slope) = LlamaRMSNorm(SIZE).to(GPU), torch.randn(2, 64, SIZE, device=GPU, requires_grad=True)
        of = (leaf, norm.requires_grad_(trained).weight) if trained else (leaf,)
        expected = norm(leaf), *torch.autograd.grad(norm(leaf), of, slope)
        replace_norms(norm)
        found = norm(leaf), *torch.autograd.grad(norm(leaf), of, slope)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
