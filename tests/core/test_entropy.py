import torch

from hfprune_dist.core.entropy import entropy_gradient


def autograd_entropy(logits):
    logits = logits.clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    entropy.sum().backward()
    return entropy.detach(), logits.grad


def test_matches_autograd_in_float64():
    logits = torch.randn(7, 50, dtype=torch.float64) * 3
    entropy, gradient = entropy_gradient(logits.clone())
    expected_entropy, expected_gradient = autograd_entropy(logits)
    torch.testing.assert_close(entropy, expected_entropy, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-10, atol=1e-12)


def test_vanishes_for_confident_and_uniform_tokens():
    confident = torch.zeros(1, 9)
    confident[0, 3] = 200.0
    for logits, expected in ((confident, 0.0), (torch.full((1, 9), 5.0), torch.tensor(9.0).log().item())):
        entropy, gradient = entropy_gradient(logits.clone())
        assert abs(entropy.item() - expected) < 1e-5
        assert gradient.abs().max() < 1e-6


def test_large_logits_stay_finite():
    entropy, gradient = entropy_gradient(torch.randn(4, 30) * 1e4)
    assert entropy.isfinite().all() and gradient.isfinite().all()


def test_gradient_sums_to_zero_over_the_vocabulary():
    _, gradient = entropy_gradient(torch.randn(5, 40, dtype=torch.float64))
    assert gradient.sum(-1).abs().max() < 1e-12
