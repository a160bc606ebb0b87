import pytest
import torch

from hfprune_dist.core import gram
from hfprune_dist.core.gram import UnresolvedError, add_gram, damped_inverse, gram_matrix, mirrored


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
    damped = matrix + 0.1 * matrix.diagonal().mean() * identity
    torch.testing.assert_close(damped_inverse(matrix, 0.1) @ damped, identity)
    assert torch.equal(matrix, before)
    torch.testing.assert_close(damped_inverse(torch.zeros_like(matrix), 0.01), identity / 0.01)


@pytest.mark.parametrize(("lost", "needed"), [(0.05, 0.1), (0.5, 1.0)])
def test_rounding_errors_larger_than_the_damping_are_damped_more(lost, needed):
    """A matrix with a mean diagonal of 1 and a negative eigenvalue, which no Gram matrix has."""
    matrix = torch.diag(torch.tensor([2 + lost, -lost, 1.0], dtype=torch.float64))
    assert torch.equal(damped_inverse(matrix, 0.01), damped_inverse(matrix, needed))


@pytest.mark.parametrize("value", [-2.0, float("nan")])
def test_what_no_damping_makes_invertible_is_refused(value):
    with pytest.raises(UnresolvedError, match="lost in rounding"):
        damped_inverse(torch.diag(torch.tensor([4.0, value, 1.0])), 0.01)
