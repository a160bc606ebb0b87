import itertools

import pytest
import torch

from hfprune_dist.core.entropy import entropy_gradient
from hfprune_dist.core.losses import (
    cross_entropy_gradient,
    distillation_gradient,
    draw_sign_bits,
    draw_uniform,
    exact_cumulative,
    random_signs_gradient,
    sample_labels,
    sampled_label_gradient,
    signs_of,
)


def some_logits(tokens=6, vocabulary=30):
    return torch.randn(tokens, vocabulary, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 2


def fisher_matrix(logits_1V):
    p = logits_1V[0].softmax(0)
    return p.diag() - p.outer(p)


def compare(result, logits, loss_of):
    """Compare a closed form with autograd."""
    logits = logits.clone().requires_grad_()
    expected = loss_of(logits)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(result[0], expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(result[1], gradient, rtol=1e-10, atol=1e-12)


def test_cross_entropy_matches_autograd():
    logits, labels = some_logits(), torch.tensor([3, 0, 29, -1, 7, -1])
    compare(
        cross_entropy_gradient(logits.clone(), labels),
        logits,
        lambda z: torch.nn.functional.cross_entropy(z, labels, ignore_index=-1, reduction="none"),
    )


def test_sampled_labels_match_autograd():
    logits, uniform = some_logits(), draw_uniform(0, 0, 6)
    labels = sample_labels(logits, uniform)
    compare(
        sampled_label_gradient(logits.clone(), uniform),
        logits,
        lambda z: torch.nn.functional.cross_entropy(z, labels, reduction="none"),
    )


def test_random_signs_match_autograd():
    logits = some_logits()
    signs = signs_of(draw_sign_bits(0, 0, 0, 30)[:6], 30, torch.float64)
    compare(
        random_signs_gradient(logits.clone(), signs.clone()),
        logits,
        lambda z: 2 * (signs * z.softmax(-1).sqrt()).sum(-1),
    )


def test_the_divergence_from_a_teacher_matches_autograd():
    logits, teacher = some_logits(), some_logits().flip(0)
    compare(
        distillation_gradient(logits.clone(), teacher.clone()),
        logits,
        lambda z: torch.nn.functional.kl_div(
            z.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="none"
        ).sum(-1),
    )
    loss, gradient = distillation_gradient(logits.clone(), logits.clone())
    assert not loss.any() and not gradient.any(), "a student that is its own teacher"


def test_labels_come_as_often_as_the_distribution_says():
    logits = some_logits(1, 7)
    grid = (torch.arange(100_000, dtype=torch.float64) + 0.5) / 100_000
    labels = sample_labels(logits.expand(100_000, -1), grid)
    shares = labels.bincount(minlength=7) / 100_000
    torch.testing.assert_close(shares.double(), logits[0].softmax(0), rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_of_the_unit_interval_are_labels_of_some_probability(dtype):
    logits = torch.tensor([[-1e4, 0.0, 1.0, -1e4]], dtype=dtype)
    assert sample_labels(logits, torch.zeros(1, dtype=torch.float64)).item() == 1
    almost = torch.tensor([1.0], dtype=torch.float64).nextafter(torch.tensor(0.0, dtype=torch.float64))
    assert sample_labels(logits, almost).item() in (2, 3)


@pytest.mark.parametrize("vocabulary", [1, 7, 49_152])
def test_probabilities_are_added_up_exactly_in_whatever_order(vocabulary):
    p = some_logits(3, vocabulary).float().softmax(-1)
    cumulative = exact_cumulative(p)
    torch.testing.assert_close(cumulative / cumulative[:, -1:], p.double().cumsum(-1).float(), rtol=0.0, atol=1e-5)
    assert (cumulative.diff(dim=1) >= 0).all()
    backwards = exact_cumulative(p.flip(1))
    assert torch.equal(backwards[:, -1], cumulative[:, -1]), "the sum of all is the same from either end"


def test_over_all_labels_the_expectation_is_the_exact_fisher_matrix():
    logits = some_logits(1, 5)
    p = logits[0].softmax(0)
    total = torch.zeros(5, 5, dtype=torch.float64)
    for label in range(5):
        _, gradient = cross_entropy_gradient(logits.clone(), torch.tensor([label]))
        total += p[label] * gradient[0].outer(gradient[0])
    torch.testing.assert_close(total, fisher_matrix(logits), rtol=1e-12, atol=1e-14)


def test_over_all_signs_the_expectation_is_the_exact_fisher_matrix():
    logits = some_logits(1, 5)
    total = torch.zeros(5, 5, dtype=torch.float64)
    for signs in itertools.product([-1.0, 1.0], repeat=5):
        _, gradient = random_signs_gradient(logits.clone(), torch.tensor([signs], dtype=torch.float64))
        total += gradient[0].outer(gradient[0]) / 2**5
    torch.testing.assert_close(total, fisher_matrix(logits), rtol=1e-12, atol=1e-14)


def test_signs_spread_less_than_labels_over_a_neuron_that_reaches_the_whole_vocabulary():
    """Variance of the estimate (w . g)^2 of w^T F w, over all draws: the variance that is claimed to be lower."""
    logits = torch.zeros(1, 8, dtype=torch.float64)
    logits[0, 0] = 3.0
    weight = torch.randn(8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    p = logits[0].softmax(0)
    exact = weight @ fisher_matrix(logits) @ weight
    by_label = sum(
        p[label] * ((cross_entropy_gradient(logits.clone(), torch.tensor([label]))[1][0] @ weight) ** 2 - exact) ** 2
        for label in range(8)
    )
    by_signs = sum(
        (
            (random_signs_gradient(logits.clone(), torch.tensor([signs], dtype=torch.float64))[1][0] @ weight) ** 2
            - exact
        )
        ** 2
        / 2**8
        for signs in itertools.product([-1.0, 1.0], repeat=8)
    )
    assert by_signs < by_label


def test_signs_are_fair_and_independent_of_each_other():
    groups = [draw_sign_bits(0, 5, group, 101) for group in range(7)]
    signs = signs_of(torch.cat(groups)[:400], 101, torch.float32)
    assert signs.shape == (400, 101) and set(signs.unique().tolist()) == {-1.0, 1.0}
    correlation = signs.T @ signs / 400
    assert signs.mean(0).abs().max() < 5 / 400**0.5
    assert (correlation - torch.eye(101)).abs().max() < 5.5 / 400**0.5


def test_what_is_drawn_depends_on_the_seed_and_the_window_alone():
    assert torch.equal(draw_uniform(1, 2, 9), draw_uniform(1, 2, 9))
    assert torch.equal(draw_sign_bits(1, 2, 9, 70), draw_sign_bits(1, 2, 9, 70))
    assert not torch.equal(draw_sign_bits(1, 2, 9, 70), draw_sign_bits(1, 2, 8, 70))
    for seed, window in ((1, 3), (2, 2), (12, 0)):
        assert not torch.isin(draw_uniform(1, 2, 9), draw_uniform(seed, window, 9)).any()
        assert not torch.equal(draw_sign_bits(1, 2, 9, 70), draw_sign_bits(seed, window, 9, 70))


@pytest.mark.parametrize("rows_per_chunk", [1, 4, 5])
def test_chunks_of_tokens_get_the_labels_of_the_whole(rows_per_chunk):
    logits, uniform = some_logits(11, 40).float(), draw_uniform(0, 0, 11)
    pieces = zip(logits.split(rows_per_chunk), uniform.split(rows_per_chunk), strict=True)
    assert torch.equal(torch.cat([sample_labels(*piece) for piece in pieces]), sample_labels(logits, uniform))


def test_large_logits_stay_finite():
    logits = torch.randn(4, 30) * 1e4
    for loss, gradient in (
        cross_entropy_gradient(logits.clone(), torch.tensor([0, 1, 2, -1])),
        sampled_label_gradient(logits.clone(), draw_uniform(0, 0, 4)),
        random_signs_gradient(logits.clone(), signs_of(draw_sign_bits(0, 0, 0, 30)[:4], 30, torch.float32)),
    ):
        assert loss.isfinite().all() and gradient.isfinite().all()


def test_in_float32_a_large_vocabulary_costs_no_digits():
    """A sum that adds word after word of the vocabulary has an error a hundred times as large."""
    logits, teacher = (torch.randn(4, 50_000, generator=torch.Generator().manual_seed(seed)) * 3 for seed in (0, 1))
    bits = draw_sign_bits(0, 0, 0, 50_000)[:4]
    for loss in (
        lambda z, _: entropy_gradient(z),
        lambda z, _: cross_entropy_gradient(z, torch.tensor([5, 0, -1, 49_999])),
        lambda z, _: random_signs_gradient(z, signs_of(bits, 50_000, z.dtype)),
        distillation_gradient,
    ):
        value, gradient = loss(logits.clone(), teacher.clone())
        exact_value, exact = loss(logits.double(), teacher.double())
        torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-5)
        assert (gradient - exact).norm() < 1e-5 * exact.norm()
