"""Fused parts compared with the layers that they replace: the same bits forward, the float64 gradient backward."""

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from hfprune_dist.core import portions
from hfprune_dist.core.memory_efficient import (
    can_be_observed,
    frozen_linear,
    gated_product,
    observe_gradient,
    observed,
    rms_norm,
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def random(*shape, dtype, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative(ours, expected):
    return (ours.double() - expected).norm() / expected.norm()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_norm_has_the_layers_bits_and_the_gradient_of_its_formula(dtype):
    norm = LlamaRMSNorm(16, eps=1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(random(16, dtype=dtype, seed=0))
    x, gradient = random(2, 5, 16, dtype=dtype, seed=1).requires_grad_(), random(2, 5, 16, dtype=dtype, seed=2)
    y = rms_norm(x, norm.weight.detach(), norm.variance_epsilon)
    assert torch.equal(y, norm(x))
    y.backward(gradient)
    exact = x.detach().double().requires_grad_()
    (exact * (exact.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()).backward(gradient.double())
    assert x.grad.dtype == dtype and relative(x.grad, exact.grad) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("biased", [False, True])
def test_a_frozen_linear_layer_has_torchs_bits_and_saves_no_tensor(dtype, biased):
    weight, bias = random(6, 16, dtype=dtype, seed=0), random(6, dtype=dtype, seed=1) if biased else None
    x, gradient = random(2, 5, 16, dtype=dtype, seed=2).requires_grad_(), random(2, 5, 6, dtype=dtype, seed=3)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = frozen_linear(x, weight, bias)
    assert torch.equal(y, torch.nn.functional.linear(x, weight, bias))
    assert kept == []
    y.backward(gradient)
    assert relative(x.grad, gradient.double() @ weight.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_a_gated_product_shows_its_output_times_the_gradient_there(monkeypatch, dtype):
    gate, up = (random(3, 7, 24, dtype=dtype, seed=seed).requires_grad_() for seed in (1, 2))
    gradient = random(3, 7, 24, dtype=dtype, seed=3)
    monkeypatch.setattr(portions, "CACHE_BYTES", 4 * 24 * 4)  # four rows
    h = gated_product(gate, up)
    assert torch.equal(h, torch.nn.functional.silu(gate) * up)
    seen = []
    observe_gradient(h, lambda product, _rows: seen.append(product.clone()))
    h.backward(gradient)
    assert len(seen) > 1 and seen[0].dtype == torch.float32
    product = torch.cat(seen)
    assert relative(product, (h.double() * gradient.double()).flatten(0, 1).detach()) < TOLERANCE[dtype]
    exact_gate, exact_up = (tensor.detach().double().requires_grad_() for tensor in (gate, up))
    (torch.nn.functional.silu(exact_gate) * exact_up).backward(gradient.double())
    for ours, exact in ((gate, exact_gate), (up, exact_up)):
        assert ours.grad.dtype == dtype and relative(ours.grad, exact.grad) < TOLERANCE[dtype]


def test_any_other_tensor_is_observed_too():
    x, seen = torch.randn(2, 4, requires_grad=True), []
    assert not can_be_observed(x) and not can_be_observed(x * 2)
    y = observed(x * 2)
    assert can_be_observed(y) and torch.equal(y, x * 2)
    observe_gradient(y, lambda product, _rows: seen.append(product))
    (y * 3).sum().backward()
    assert torch.equal(torch.cat(seen), y * 3)
    assert torch.equal(x.grad, torch.full((2, 4), 6.0))
