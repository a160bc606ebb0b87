"""Losses' closed forms, compared with autograd in float64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.core import head, losses
from hfprune_dist.core.head import IDENTITY, AfterHead, Batch, Outputs, Rows
from hfprune_dist.core.losses import (
    SIGN_TOKENS,
    _counted_bits,
    cross_entropy_gradient,
    distillation_gradient,
    draw_sign_bits,
    entropy_gradient,
    random_signs_gradient,
    signs_of,
    split_mix,
    summed_divergence,
)
from hfprune_dist.methods import CRITERIA

LABELS = torch.tensor([3, 0, 29, -1, 7, -1])


def some_logits(tokens=6, vocabulary=30, seed=0):
    return torch.randn(tokens, vocabulary, generator=torch.Generator().manual_seed(seed)).double() * 2


def signs(vocabulary, dtype=torch.float64, tokens=6):
    return signs_of(draw_sign_bits(0, 0, 0, vocabulary)[:tokens], vocabulary, dtype)


def kl(z, teacher):
    log_p = teacher.log_softmax(-1)
    return torch.nn.functional.kl_div(z.log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)


def of_labels(z):
    return torch.nn.functional.cross_entropy(z, LABELS, ignore_index=-1, reduction="none")


# Name -> the closed form and the loss, as functions of logits and a teacher's logits.
LOSSES = {
    "entropy": (lambda z, _: entropy_gradient(z), lambda z, _: -(z.softmax(-1) * z.log_softmax(-1)).sum(-1)),
    "cross entropy": (lambda z, _: cross_entropy_gradient(z, LABELS), lambda z, _: of_labels(z)),
    "random signs": (
        lambda z, _: random_signs_gradient(z, signs(z.shape[1], z.dtype)),
        lambda z, _: 2 * (signs(z.shape[1]) * z.softmax(-1).sqrt()).sum(-1),
    ),
    "divergence": (distillation_gradient, kl),
}


@pytest.mark.parametrize("name", LOSSES)
def test_closed_forms_match_autograd(name):
    closed, loss = LOSSES[name]
    logits, teacher = some_logits().requires_grad_(), some_logits(seed=1)
    expected = loss(logits, teacher)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    value, found = closed(logits.detach().clone(), teacher.clone())
    torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found, gradient, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_in_float32_a_large_vocabulary_and_large_logits_cost_no_digits(name):
    """A sum that adds word after word of the vocabulary has an error a hundred times as large."""
    closed, _ = LOSSES[name]
    logits, teacher = some_logits(6, 50_000).float(), some_logits(6, 50_000, seed=1).float()
    value, gradient = closed(logits.clone(), teacher.clone())
    exact_value, exact = closed(logits.double(), teacher.double())
    torch.testing.assert_close(value.double(), exact_value, rtol=1e-5, atol=1e-5)
    assert (gradient - exact).norm() < 1e-5 * exact.norm()
    assert all(found.isfinite().all() for found in closed(1e4 * some_logits().float(), some_logits().float()))


@given(masked=st.sets(st.integers(0, 29), max_size=20), seed=st.integers(0, 99))
@settings(max_examples=30)
@pytest.mark.parametrize("name", LOSSES)
def test_words_that_are_impossible_change_nothing(name, masked, seed):
    """As if the vocabulary didn't have them."""
    closed, _ = LOSSES[name]
    masked -= set(LABELS.tolist())
    columns = torch.tensor(sorted(masked), dtype=torch.int64)
    logits, teacher = (some_logits(seed=seed + add).index_fill(1, columns, -torch.inf) for add in range(2))
    value, gradient = closed(logits.clone(), teacher.clone())
    # In place of -inf, a logit so low that its probability is 0 in float64.
    low = (z.nan_to_num(neginf=-1e4) for z in (logits, teacher))
    expected, slopes = closed(*low)
    torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slopes, rtol=1e-12, atol=1e-12)
    assert gradient.isfinite().all() and not gradient[:, columns].any()


def test_over_all_signs_the_expectation_is_the_exact_fisher_matrix():
    logits = some_logits(1, 5)
    p = logits[0].softmax(0)
    total = torch.zeros(5, 5, dtype=torch.float64)
    for drawn in itertools.product([-1.0, 1.0], repeat=5):
        _, gradient = random_signs_gradient(logits.clone(), torch.tensor([drawn], dtype=torch.float64))
        total += gradient[0].outer(gradient[0]) / 2**5
    torch.testing.assert_close(total, p.diag() - p.outer(p), rtol=1e-12, atol=1e-14)


def counted_bits(seed, window, tokens, vocabulary):
    batch = Batch(torch.zeros(1, tokens, dtype=torch.int64), [window], vocabulary, seed)
    return _counted_bits(batch)(slice(0, tokens))


@pytest.mark.parametrize("counts", [False, True])
def test_signs_are_fair_and_independent_and_depend_on_the_seed_and_the_window(counts):
    groups = [draw_sign_bits(0, 5, group, 101) for group in range(7)]
    bits = counted_bits(0, 5, 400, 101) if counts else torch.cat(groups)[:400]
    drawn = signs_of(bits, 101, torch.float32)
    assert drawn.shape == (400, 101) and set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert drawn.mean(0).abs().max() < 5 / 400**0.5
    assert (drawn.T @ drawn / 400 - torch.eye(101)).abs().max() < 5.5 / 400**0.5
    draw = counted_bits if counts else draw_sign_bits
    assert torch.equal(draw(1, 2, 9, 70), draw(1, 2, 9, 70))
    for other in ((1, 3, 9), (2, 2, 9), (12, 0, 9), *([] if counts else [(1, 2, 8)])):
        assert not torch.equal(draw(*other, 70), draw(1, 2, 9, 70))


def test_counting_makes_the_published_sequence():
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    found = split_mix(torch.tensor(1234567), torch.arange(4))
    assert [number % 2**64 for number in found.tolist()] == expected


@pytest.mark.parametrize(
    ("criterion", "counts"), [("cross_entropy", False), ("fisher_signs", False), ("fisher_signs", True)]
)
def test_neither_chunks_nor_micro_batches_change_labels_or_signs(monkeypatch, criterion, counts):
    if counts:  # as on a GPU
        monkeypatch.setattr(losses, "_drawn_bits", _counted_bits)
    windows, tokens, vocabulary = (7, 3), 2 * SIGN_TOKENS + 20, 40
    input_ids = torch.randint(vocabulary, (2, tokens), generator=torch.Generator().manual_seed(0))
    logits = some_logits(2 * tokens, vocabulary)

    def gradients(batches, chunk):
        for places in batches:
            batch = Batch(input_ids[places], [windows[place] for place in places], vocabulary, 0)
            of_rows = CRITERIA[criterion].loss.of_batch(batch)
            some = logits.view(2, tokens, vocabulary)[places].flatten(0, 1)
            for start in range(0, len(some), chunk):
                rows = slice(start, min(start + chunk, len(some)))
                yield of_rows(Rows(some[rows].clone(), rows))[1]

    whole = torch.cat(list(gradients([[0, 1]], 2 * tokens)))
    for chunk in (1, 50, SIGN_TOKENS, tokens + 1):
        assert torch.equal(torch.cat(list(gradients([[0, 1]], chunk))), whole)
        assert torch.equal(torch.cat(list(gradients([[0], [1]], chunk))), whole)


@pytest.mark.parametrize(("tokens_a_chunk", "has_bias"), [(4, True), (100, False)])
def test_the_divergence_to_train_on_is_that_of_the_definition_and_leaves_the_head_alone(
    monkeypatch, tokens_a_chunk, has_bias
):
    shapes = (13, 8), (13, 8), (17, 8), (1, 17)
    hidden_NC, dense_NC, weight_VC, bias_V = (some_logits(*shape, seed) for seed, shape in enumerate(shapes))
    monkeypatch.setattr(head, "CHUNK_BYTES", tokens_a_chunk * 17 * 8)
    bias_V = bias_V[0] if has_bias else None
    ours, theirs = hidden_NC.clone().requires_grad_(), hidden_NC.clone().requires_grad_()
    weight_VC.requires_grad_()
    head_of_both = weight_VC, bias_V
    loss = summed_divergence(Outputs(ours, *head_of_both), Outputs(dense_NC, *head_of_both), torch.arange(13), 0.0)
    logits = [torch.nn.functional.linear(states_NC, weight_VC.detach(), bias_V) for states_NC in (theirs, dense_NC)]
    expected = kl(*logits).sum()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (loss * 3).backward()
    (expected * 3).backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-12)
    assert weight_VC.grad is None


@pytest.mark.parametrize("after", [IDENTITY, AfterHead(0.5, 3.0)])
def test_a_trained_head_and_labels_get_the_gradients_of_a_loss_on_all_logits(monkeypatch, after):
    shapes = (13, 8), (13, 8), (17, 8), (17, 8), (1, 17)
    hidden_NC, dense_NC, weight_VC, dense_VC, bias_V = (some_logits(*shape, seed) for seed, shape in enumerate(shapes))
    bias_V = bias_V[0]
    labels_N = torch.arange(13).where(torch.arange(13) % 3 > 0, -100)
    monkeypatch.setattr(head, "CHUNK_BYTES", 4 * 17 * 8)
    ours, theirs = ([part.clone().requires_grad_() for part in (hidden_NC, weight_VC, bias_V)] for _ in range(2))
    loss = summed_divergence(Outputs(*ours, after), Outputs(dense_NC, dense_VC, None, after), labels_N, 0.7)
    logits_NV, dense_NV = torch.nn.functional.linear(*theirs), dense_NC @ dense_VC.T
    if after.cap:
        logits_NV, dense_NV = (after.cap * (after.scale * each / after.cap).tanh() for each in (logits_NV, dense_NV))
    labelled = torch.nn.functional.cross_entropy(logits_NV, labels_N, reduction="sum")
    expected = kl(logits_NV, dense_NV).sum() + 0.7 * labelled
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (loss * 3).backward()
    (expected * 3).backward()
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-9, atol=1e-12)


def test_no_tokens_are_no_divergence_but_keep_the_graph():
    hidden_NC, weight_VC = some_logits(5, 8).requires_grad_(), some_logits(17, 8)
    nothing = Outputs(hidden_NC[:0], weight_VC, None)
    loss = summed_divergence(nothing, nothing, torch.arange(0), 0.0)
    loss.backward()
    assert loss.item() == 0.0 and not hidden_NC.grad.any()
