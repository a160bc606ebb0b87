import pytest
import torch

from hfprune_dist.core import triangle
from hfprune_dist.core.exact_sums import (
    ExactGram,
    ExactOverflowError,
    ExactSquares,
    ExactSum,
    GramScale,
    TensorScale,
)
from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.core.triangle import packed_size


def terms(count=12, width=9):
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(-1.5, 1.5, width)  # neurons of very different sizes
    hidden = [torch.randn(20, width, generator=generator) * scale for _ in range(count)]
    return [rows.T @ rows for rows in hidden]


def summed(grams, order, parts=1):
    totals = []
    for part in range(parts):
        gram = ExactGram(grams[0].diagonal(), len(grams))
        for index in order[part::parts]:
            gram.add(grams[index])
        totals.append(gram.total_P.integers())
    gram.total_P.integers().copy_(torch.stack(totals).sum(0))
    return gram.value()


def test_neither_order_nor_ranks_change_a_bit():
    grams = terms()
    whole = summed(grams, list(range(12)))
    assert torch.equal(whole, summed(grams, list(reversed(range(12)))))
    for parts in (2, 3, 5):
        assert torch.equal(whole, summed(grams, [7, 2, 0, 11, 5, 1, 3, 4, 10, 9, 8, 6], parts))


def test_the_sum_is_exact_to_more_than_float32():
    grams = terms()
    expected = torch.stack(grams).double().sum(0)
    scale = expected.diagonal().sqrt()
    error = (summed(grams, list(range(12))) - expected) / scale[:, None] / scale
    assert error.abs().max() < 1e-11


def test_squares_are_the_diagonal_of_the_gram_matrix_bit_by_bit():
    grams = terms()
    squares = ExactSquares(grams[0].diagonal(), len(grams))
    for gram in reversed(grams):
        squares.add(gram.diagonal().double())
    assert torch.equal(squares.value(), summed(grams, list(range(12))).diagonal())
    with pytest.raises(ExactOverflowError):
        squares.add(grams[0].diagonal() * float("nan"))


def test_a_neuron_that_is_silent_at_first_is_heard_later():
    first, second = torch.eye(3), torch.eye(3) * 5
    first[1, 1] = 0
    gram = ExactGram(first.diagonal(), 2)
    gram.add(first)
    gram.add(second)
    assert torch.allclose(gram.value(), (first + second).double())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e8])
def test_what_is_out_of_range_is_refused(bad):
    gram = ExactGram(torch.ones(3), 2)
    gram.add(torch.eye(3))
    with pytest.raises(ExactOverflowError):
        gram.add(torch.eye(3) * bad)
    assert torch.equal(gram.value(), torch.eye(3).double())


@pytest.mark.parametrize("first", [float("nan"), float("inf")])
def test_a_first_term_that_is_not_finite_holds_nothing(first):
    holds = GramScale(torch.tensor([1.0, first]), 4).holds
    assert not holds(torch.diag(torch.tensor([1.0, first])))
    assert not holds(torch.eye(2))


def test_plain_sums_are_as_exact_and_as_free_of_order():
    generator = torch.Generator().manual_seed(5)
    terms = [torch.randn(4, 3, generator=generator) for _ in range(7)]
    totals = []
    for order in (terms, terms[::-1]):
        exact = ExactSum(float(terms[0].abs().max()), 7, terms[0].shape, torch.device("cpu"))
        for term in order:
            exact.add(term)
        totals.append(exact.value())
    assert torch.equal(*totals)
    assert (totals[0] - torch.stack(terms).double().sum(0)).abs().max() < 1e-10
    with pytest.raises(ExactOverflowError):
        exact.add(torch.full((4, 3), 1e9))
    assert torch.equal(exact.value(), totals[0])


@pytest.mark.parametrize("maximum", [float("nan"), float("inf")])
def test_a_sum_does_not_begin_with_what_is_not_finite(maximum):
    with pytest.raises(ExactOverflowError, match="NaN"):
        ExactSum(maximum, 3, torch.Size([2]), torch.device("cpu"))


def test_infinity_is_refused_even_if_the_range_goes_beyond_float32():
    exact = ExactSum(1e35, 3, torch.Size([2, 2]), torch.device("cpu"))
    exact.add(torch.full((2, 2), 2e35))
    with pytest.raises(ExactOverflowError):
        exact.add(torch.tensor([[1.0, 1.0], [torch.inf, 1.0]]))
    torch.testing.assert_close(exact.value(), torch.full((2, 2), 2e35, dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 7, 8, 9, 20])
def test_a_total_is_packed_and_makes_the_whole_matrix(size, monkeypatch):
    """Rounded as in float64, whatever the dtype of the terms."""
    monkeypatch.setattr(triangle, "BLOCK", 8)
    loudness = torch.logspace(-19, 17, size)
    grams = [
        gram_matrix(torch.randn(30, size, generator=torch.Generator().manual_seed(seed)) * loudness)
        for seed in range(4)
    ]
    scale = GramScale(grams[0].diagonal(), len(grams))
    exact_D = scale._scale_D
    rounded_DD = sum((it.double() * exact_D[:, None] * exact_D).round() for it in grams)
    for dtype in (torch.float32, torch.float64):
        total_P = torch.zeros(packed_size(size), dtype=torch.int64)
        for term in grams:
            assert scale.holds(term)
            scale.add(term.to(dtype), total_P)
        assert torch.equal(scale.value_of(total_P), rounded_DD / exact_D[:, None] / exact_D)
        assert torch.equal(scale.diagonal_of(total_P), rounded_DD.diagonal().long())
    assert scale.total_shape((size, size)) == tuple(total_P.shape)
    rows = list(triangle.block_rows(size))
    assert [row.start for row in rows] == list(range(0, size, 8)) and rows[-1].end == size
    assert len(total_P) == sum(min(8, size - start) * (size - start) for start in range(0, size, 8))


@pytest.mark.parametrize("maximum", [1e-38, 1e-30, 1e-9, 1.0, 1e9, 1e35])
def test_float32_terms_are_rounded_as_in_float64(maximum):
    """Also where float32 doesn't hold the scale, and where it holds a term only with fewer bits."""
    scale = TensorScale(torch.tensor(maximum, dtype=torch.float64), 4)
    term = torch.randn(50, 30, generator=torch.Generator().manual_seed(1)) * maximum
    term[:, :5] *= torch.logspace(0, -8, 50)[:, None]
    totals = [torch.zeros(50, 30, dtype=torch.int64) for _ in range(2)]
    for total, dtype in zip(totals, (torch.float32, torch.float64), strict=True):
        scale.add(term.to(dtype), total)
    assert torch.equal(*totals) and totals[0].any() == term.any()


def test_what_is_beyond_float64_is_added_up_exactly():
    """Later terms may be much larger than the first, whose last bits still count."""
    generator = torch.Generator().manual_seed(3)
    term, factors = torch.randn(4, 3, generator=generator), (1, 2.0**19, 1.1, -(2.0**18.5), 3, 2.0**19, 1.3)
    exact = ExactSum(float(term.abs().max()), 8, term.shape, torch.device("cpu"))
    scale = TensorScale(term.abs().max().double(), 8)
    expected = torch.zeros(term.shape, dtype=torch.int64)
    for factor in factors:
        exact.add(term * factor)
        scale.add(term * factor, expected)
    assert expected.abs().max() > 2**53
    assert torch.equal(exact.total.integers(), expected)
    assert torch.equal(exact.value(), scale.value_of(expected))
