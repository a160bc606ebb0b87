import pytest
import torch

from hfprune_dist.core import gram
from hfprune_dist.core.gram import UnresolvedError, add_gram, damped_inverse, gram_matrix, mirrored, ridge_of


@pytest.mark.parametrize("size", [7, 8, 20])
def test_blocks_make_the_whole_symmetric_matrix(size, monkeypatch):
    monkeypatch.setattr(gram, "BLOCK", 8)
    vectors = torch.randn(30, size, generator=torch.Generator().manual_seed(size))
    torch.testing.assert_close(gram_matrix(vectors), vectors.T @ vectors)
    total = torch.zeros(size, size, dtype=torch.float64)
    for some in vectors.split(11):
        add_gram(total, some)
    assert torch.equal(mirrored(total), sum(gram_matrix(some).double() for some in vectors.split(11)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_damped_inverse_leaves_what_it_inverts(dtype):
    vectors, identity = torch.randn(30, 8, dtype=dtype), torch.eye(8, dtype=dtype)
    matrix = vectors.T @ vectors
    before = matrix.clone()
    ridge = torch.linspace(0.1, 1, 8, dtype=dtype)
    torch.testing.assert_close(damped_inverse(matrix, ridge) @ (matrix + ridge.diag()), identity)
    assert torch.equal(matrix, before)


def test_a_ridge_means_the_same_in_any_units_and_leaves_no_channel_without():
    energy, weight = (torch.rand(8, generator=torch.Generator().manual_seed(seed)).double() for seed in range(2))
    factor = torch.logspace(-3, 3, 8, dtype=torch.float64)
    ridge, changed = ridge_of(0.1, energy, weight), ridge_of(0.1, energy * factor**2, weight / factor**2)
    torch.testing.assert_close(changed, ridge * factor**2)
    torch.testing.assert_close((ridge * weight).median(), 0.1 * (energy * weight).median())
    silent, free = torch.tensor([0.0, 0.0, 0.0, 2.0]), torch.tensor([1.0, 2.0, 0.0, 3.0])
    for some in (ridge_of(0.1, silent, free), ridge_of(0.1, free, silent), ridge_of(0.1, silent, 0 * free)):
        assert some.isfinite().all() and (some > 0).all()


@pytest.mark.parametrize(("lost", "needed"), [(0.05, 0.1), (0.5, 1.0)])
def test_rounding_errors_larger_than_the_damping_are_damped_more(lost, needed):
    """A matrix with a negative eigenvalue, which no Gram matrix has."""
    matrix = torch.diag(torch.tensor([2 + lost, -lost, 1.0], dtype=torch.float64))
    ones = torch.ones(3, dtype=torch.float64)
    assert torch.equal(damped_inverse(matrix, 0.01 * ones), damped_inverse(matrix, needed * ones))


@pytest.mark.parametrize("value", [-2.0, float("nan")])
def test_what_no_damping_makes_invertible_is_refused(value):
    with pytest.raises(UnresolvedError, match="lost in rounding"):
        damped_inverse(torch.diag(torch.tensor([4.0, value, 1.0])), torch.full((3,), 0.01))
