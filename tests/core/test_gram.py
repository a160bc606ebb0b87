import pytest
import torch

from hfprune_dist.core import triangle
from hfprune_dist.core.gram import damped_inverse, gram_matrix


@pytest.mark.parametrize("size", [1, 7, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_make_the_whole_symmetric_matrix(size, dtype, monkeypatch):
    monkeypatch.setattr(triangle, "BLOCK", 8)
    vectors = torch.randn(30, size, generator=torch.Generator().manual_seed(size), dtype=dtype)
    torch.testing.assert_close(gram_matrix(vectors), vectors.T @ vectors)


def test_nothing_to_invert_is_no_matter():
    identity = torch.eye(3, dtype=torch.float64)
    torch.testing.assert_close(damped_inverse(torch.zeros(3, 3), 0.01), identity / 0.01)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_damped_inverse_leaves_what_it_inverts(dtype):
    vectors = torch.randn(30, 8, generator=torch.Generator().manual_seed(0), dtype=dtype)
    matrix = vectors.T @ vectors
    before = matrix.clone()
    damped = matrix.double() + 0.1 * matrix.diagonal().mean().double() * torch.eye(8).double()
    torch.testing.assert_close(damped_inverse(matrix, 0.1) @ damped, torch.eye(8).double())
    assert torch.equal(matrix, before)
