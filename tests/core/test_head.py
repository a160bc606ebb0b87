import pytest
import torch

from hfprune_dist.core import head
from hfprune_dist.core.losses import cross_entropy_gradient, distillation_gradient, entropy_gradient


def entropy(rows):
    return entropy_gradient(rows.logits_NV)


def by_autograd(hidden, weight, bias):
    hidden = hidden.clone().requires_grad_()
    log_p = torch.nn.functional.linear(hidden, weight, bias).log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    entropy.sum().backward()
    return entropy.detach(), hidden.grad


@pytest.mark.parametrize(("with_bias", "rows_per_chunk"), [(False, 1), (True, 4), (False, 100)])
def test_chunks_give_the_gradient_of_the_whole(monkeypatch, rows_per_chunk, with_bias):
    hidden = torch.randn(11, 8, dtype=torch.float64)
    weight = torch.randn(30, 8, dtype=torch.float64)
    bias = torch.randn(30, dtype=torch.float64) if with_bias else None
    monkeypatch.setattr(head, "CHUNK_BYTES", rows_per_chunk * 30 * 8)
    ((loss, gradient),) = head.head_gradients(head.Outputs(hidden, weight, bias), [entropy])
    expected_loss, expected_gradient = by_autograd(hidden, weight, bias)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_losses_share_the_logits_and_leave_each_others_alone(monkeypatch):
    model = head.Outputs(torch.randn(11, 8), torch.randn(30, 8), None)
    labels = torch.randint(0, 30, (11,))
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 30 * 4)
    linear, calls = torch.nn.functional.linear, []
    monkeypatch.setattr(torch.nn.functional, "linear", lambda *args: calls.append(1) or linear(*args))

    def cross_entropy(rows):
        return cross_entropy_gradient(rows.logits_NV, labels[rows.numbers])

    for losses in ([entropy, cross_entropy], [cross_entropy, entropy, cross_entropy]):
        calls.clear()
        together = head.head_gradients(model, losses)
        assert len(calls) == 3, "one computation of the logits of each of 3 chunks"
        for loss, (loss_N, gradient_NC) in zip(losses, together, strict=True):
            ((alone_N, alone_NC),) = head.head_gradients(model, [loss])
            assert torch.equal(loss_N, alone_N) and torch.equal(gradient_NC, alone_NC)


@pytest.mark.parametrize("after", [head.AfterHead(0.3), head.AfterHead(cap=2.0), head.AfterHead(1.7, 3.0)], ids=str)
@pytest.mark.parametrize("losses", [1, 2])
def test_what_becomes_of_logits_is_part_of_the_gradient(monkeypatch, after, losses):
    hidden, teacher = torch.randn(2, 11, 8, dtype=torch.float64)
    weight = torch.randn(30, 8, dtype=torch.float64)
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 30 * 8)

    def logits(states):
        z = states @ weight.T * after.scale
        return z if after.cap is None else after.cap * torch.tanh(z / after.cap)

    ours = hidden.clone().requires_grad_()
    log_p, log_q = logits(teacher).log_softmax(-1), logits(ours).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected.sum().backward()
    divergences = [lambda rows: distillation_gradient(rows.logits_NV, rows.teacher_NV)] * losses
    model, dense = (head.Outputs(states, weight, None, after) for states in (hidden, teacher))
    for loss, gradient in head.head_gradients(model, divergences, dense):
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(gradient, ours.grad, rtol=1e-10, atol=1e-12)
    chunks = torch.cat([chunk for _, chunk in model.logits()])
    torch.testing.assert_close(chunks, logits(hidden), rtol=1e-12, atol=1e-12)
