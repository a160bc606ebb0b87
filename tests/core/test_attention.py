"""Causal attention against torch's: the same bits forward, the float64 gradient backward."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from hfprune_dist.core import attention
from hfprune_dist.core.attention import causal_attention

TOLERANCE = {torch.float32: 3e-6, torch.bfloat16: 2e-2}
SHAPES = {
    "one head to a group": (2, 3, 3, 17, 8),
    "groups": (2, 6, 2, 33, 16),
    "one group, a scale that is no power of two": (1, 4, 1, 21, 12),
    "one token": (1, 4, 2, 1, 8),
    "longer than a block": (1, 4, 2, 2 * attention.QUERIES + 5, 16),
}


def inputs(shape, dtype):
    """q, k and v as projections lay them out, and a gradient."""
    windows, heads, groups, tokens, size = shape
    generator = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn(windows, tokens, number, size, generator=generator).to(dtype).transpose(1, 2)
        for number in (heads, groups, groups, heads)
    )
    return [tensor.requires_grad_() for tensor in (q, k, v)], gradient


def gradients(attend, tensors, gradient):
    return torch.autograd.grad(attend(*tensors), tensors, gradient)


def theirs(q, k, v):
    return scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3, enable_gqa=True)


def ours(q, k, v):
    return causal_attention(q, k, v, 0.3)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_attention_has_torchs_bits_and_the_float64_gradient(shape, dtype):
    tensors, gradient = inputs(shape, dtype)
    assert torch.equal(ours(*tensors), theirs(*tensors))
    exact = gradients(theirs, [tensor.detach().double().requires_grad_() for tensor in tensors], gradient.double())
    for tensor, found, expected in zip(tensors, gradients(ours, tensors, gradient), exact, strict=True):
        assert found.dtype == dtype and found.shape == tensor.shape
        assert (found.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_blocks_of_queries_add_up_in_float64_too(monkeypatch):
    tensors, gradient = inputs(SHAPES["groups"], torch.float64)
    monkeypatch.setattr(attention, "QUERIES", 5)
    found, expected = gradients(ours, tensors, gradient), gradients(theirs, tensors, gradient)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)


def test_a_window_gets_the_same_gradients_alone_and_with_others():
    tensors, gradient = inputs(SHAPES["groups"], torch.float32)
    alone = [tensor[1:].detach().requires_grad_() for tensor in tensors]
    for one, both in zip(gradients(ours, alone, gradient[1:]), gradients(ours, tensors, gradient), strict=True):
        assert torch.equal(one, both[1:])
