import pytest
import torch

from hfprune_dist.core import gram
from hfprune_dist.core.gram import gram_matrix


@pytest.mark.parametrize("size", [1, 7, 8, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_blocks_make_the_whole_symmetric_matrix(size, dtype, monkeypatch):
    monkeypatch.setattr(gram, "BLOCK", 8)
    vectors = torch.randn(30, size, generator=torch.Generator().manual_seed(size), dtype=dtype)
    torch.testing.assert_close(gram_matrix(vectors), vectors.T @ vectors)
