"""The divergence as a loss: its value and gradient, compared with float64 autograd of its definition."""

import pytest
import torch

from hfprune_dist.core import head
from hfprune_dist.core.distillation import summed_divergence


def tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("tokens_a_chunk", [1, 4, 100])
def test_value_and_gradient_are_those_of_the_definition(monkeypatch, has_bias, tokens_a_chunk):
    hidden_NC, dense_NC, weight_VC, bias_V = tensors((13, 8), (13, 8), (17, 8), (17,))
    monkeypatch.setattr(head, "CHUNK_BYTES", tokens_a_chunk * 17 * 8)
    bias_V = bias_V if has_bias else None
    ours, theirs = hidden_NC.clone().requires_grad_(), hidden_NC.clone().requires_grad_()
    loss = summed_divergence(ours, dense_NC, weight_VC, bias_V)
    log_p, log_q = (torch.nn.functional.linear(it, weight_VC, bias_V).log_softmax(-1) for it in (dense_NC, theirs))
    expected = (log_p.exp() * (log_p - log_q)).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (loss * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)


def test_no_tokens_are_no_divergence_but_keep_the_graph():
    hidden_NC, weight_VC = tensors((5, 8), (17, 8))
    hidden_NC.requires_grad_()
    loss = summed_divergence(hidden_NC[:0], hidden_NC.detach()[:0], weight_VC, None)
    assert loss.item() == 0.0
    loss.backward()
    assert not hidden_NC.grad.any()


def test_head_gets_no_gradient():
    hidden_NC, dense_NC, weight_VC = tensors((5, 8), (5, 8), (17, 8))
    weight_VC.requires_grad_()
    summed_divergence(hidden_NC.requires_grad_(), dense_NC, weight_VC, None).backward()
    assert weight_VC.grad is None
