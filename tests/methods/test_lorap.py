"""Factors and scores compared with definitions: torch's singular value decomposition, and sums written out."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.methods.lorap import SILENT, kept_neurons, low_rank_factors, neuron_scores


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=60)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(0, 99), st.data())
def test_factors_are_those_of_the_weighted_decomposition(outputs, inputs, seed, data):
    rank = data.draw(st.integers(1, min(outputs, inputs)))
    weight, norms = drawn(outputs, inputs, seed=seed), drawn(inputs, seed=seed + 100).abs() + 0.1
    first, second = low_rank_factors(weight.float(), norms, rank)
    weight = weight.float().double()
    left, values, right = torch.linalg.svd(weight * norms, full_matrices=False)
    assert first.shape == (rank, inputs) and second.shape == (outputs, rank)
    roots = values[:rank].sqrt()
    signs = (second * left[:, :rank]).sum(0).sign()
    torch.testing.assert_close(second, left[:, :rank] * roots * signs, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(first, signs[:, None] * roots[:, None] * right[:rank] / norms, rtol=1e-5, atol=1e-7)
    if rank == min(outputs, inputs):
        torch.testing.assert_close(second @ first, weight)


def test_a_silent_channel_hardly_counts_and_is_no_division_by_zero():
    weight, norms = drawn(6, 4), torch.tensor([1.0, 0.0, 2.0, 0.5]).double()
    silent = low_rank_factors(weight, norms, 2)
    counted = low_rank_factors(weight, torch.where(norms == 0, SILENT, norms), 2)
    assert all(torch.equal(*pair) for pair in zip(silent, counted, strict=True))
    nothing = low_rank_factors(weight, torch.zeros(4), 4)
    torch.testing.assert_close(nothing[1] @ nothing[0], weight)


def test_directions_of_which_nothing_is_left_are_zeros():
    weight = drawn(6, 2) @ drawn(2, 5, seed=1)
    first, second = low_rank_factors(weight, torch.ones(5), 4)
    torch.testing.assert_close(second @ first, weight)
    assert not first[2:].abs().max() > 0
    zeros = low_rank_factors(torch.zeros(3, 3), torch.ones(3), 2)
    assert all(torch.equal(it, torch.zeros_like(it)) for it in zeros)


def test_scores_are_norms_of_weights_times_what_they_read():
    gate, up, down = drawn(5, 3), drawn(5, 3, seed=1), drawn(3, 5, seed=2)
    read, hidden = drawn(3, seed=3).abs(), drawn(5, seed=4).abs()
    found = neuron_scores((gate, up), down, read, hidden)
    for n in range(5):
        rows = sum(math.sqrt(sum(float(it[n, j] * read[j]) ** 2 for j in range(3))) for it in (gate, up))
        column = math.sqrt(sum(float(down[i, n] * hidden[n]) ** 2 for i in range(3)))
        assert float(found[n]) == pytest.approx(rows + column)


@settings(max_examples=60)
@given(st.integers(1, 400), st.integers(0, 99), st.data())
def test_the_lowest_hundredth_stays_and_those_after_it_go(count, seed, data):
    width = data.draw(st.integers(1, count))
    scores = drawn(count, seed=seed)
    ascending = sorted(range(count), key=lambda n: float(scores[n]))
    lowest = min(int(0.01 * count), width)
    expected = sorted(ascending[:lowest] + ascending[lowest + count - width :])
    assert kept_neurons(scores, width).tolist() == expected
