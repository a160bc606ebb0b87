import pytest
import torch

from hfprune_dist.core import head
from hfprune_dist.core.entropy import entropy_gradient


def by_autograd(hidden, weight, bias):
    hidden = hidden.clone().requires_grad_()
    log_p = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    entropy.sum().backward()
    return entropy.detach(), hidden.grad


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("rows_per_chunk", [1, 4, 100])
def test_chunks_give_the_gradient_of_the_whole(monkeypatch, rows_per_chunk, with_bias):
    hidden = torch.randn(11, 8, dtype=torch.float64)
    weight = torch.randn(30, 8, dtype=torch.float64)
    bias = torch.randn(30, dtype=torch.float64) if with_bias else None
    monkeypatch.setattr(head, "CHUNK_BYTES", rows_per_chunk * 30 * 8)
    loss, gradient = head.head_gradient(hidden, weight, bias, entropy_gradient)
    expected_loss, expected_gradient = by_autograd(hidden, weight, bias)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_no_chunk_exceeds_the_budget(monkeypatch):
    monkeypatch.setattr(head, "CHUNK_BYTES", 1000)
    sizes = [logits.numel() * 4 for _, logits in head.logit_chunks(torch.randn(20, 4), torch.randn(60, 4), None)]
    assert max(sizes) <= 1000 and sum(sizes) == 20 * 60 * 4


def test_bfloat16_models_get_float32_losses():
    loss, gradient = head.head_gradient(
        torch.randn(3, 8).bfloat16(), torch.randn(20, 8).bfloat16(), None, entropy_gradient
    )
    assert loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
