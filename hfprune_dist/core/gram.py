"""Gram matrices of many vectors, of which CPUs compute only one half, as they are symmetric; ridges and inverses."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.core.portions import wide_dtype, wide_product, widened

# Number of rows in a block: large enough for matrix products at full speed.
BLOCK = 256
# Bounds of a channel's ridge, as shares of its energy: float32 resolves no less, and more hardly changes anything.
LEAST, MOST = 1e-4, 1e4
# Factors on the ridge, which are tried in turn until the damped matrix is positive definite.
MORE_DAMPING = (1.0, 10.0, 100.0)


class UnresolvedError(ValueError):
    """A Gram matrix is mostly rounding errors, since some of its channels are so much larger than others."""

    def __init__(self) -> None:
        super().__init__("some are so large that others are lost in rounding")


def gram_matrix(vectors_ND: Tensor) -> Tensor:
    """Return the sum of v v^T over the rows, in their ``wide_dtype``."""
    size = vectors_ND.shape[1]
    gram_DD = vectors_ND.new_zeros(size, size, dtype=wide_dtype(vectors_ND.dtype))
    add_gram(gram_DD, vectors_ND)
    return mirrored(gram_DD)


def add_gram(sum_DD: Tensor, vectors_ND: Tensor) -> None:
    """Add the sum of v v^T over the rows to ``sum_DD``; CPUs add only its upper half: call ``mirrored`` in the end."""
    if vectors_ND.device.type != "cpu":
        sum_DD += wide_product(vectors_ND, vectors_ND)
        return
    vectors_ND = widened(vectors_ND)
    for start in range(0, len(sum_DD), BLOCK):
        rows = slice(start, start + BLOCK)
        sum_DD[rows, start:] += vectors_ND[:, rows].T @ vectors_ND[:, start:]


def mirrored(sum_DD: Tensor) -> Tensor:
    """Complete a sum of ``add_gram`` in place, its lower triangle by its blocks above the diagonal, and return it."""
    for end in range(BLOCK, len(sum_DD), BLOCK):
        rows = slice(end - BLOCK, end)
        sum_DD[end:, rows] = sum_DD[rows, end:].T
    return sum_DD


def ridge_of(factor: float | Tensor, energy_D: Tensor, weight_D: Tensor | float = 1.0) -> Tensor:
    """Return each channel's ridge: ``factor`` times the median contribution, divided by the channel's weight.

    A contribution is a channel's energy, E[h^2], times its weight, such as the squared norm of its column: the same in
    any units of the channel, as is what the ridge means. The ridge of a silent channel is 1.
    """
    contribution_D = energy_D * weight_D
    typical = contribution_D.median()
    typical = typical.where(typical > 0, contribution_D.mean())
    share_D = (typical / contribution_D).nan_to_num(nan=MOST).clamp(LEAST, MOST)
    return (factor * share_D * energy_D).where(energy_D > 0, 1.0)


def damped_inverse(gram_DD: Tensor, ridge_D: Tensor) -> Tensor:
    """Return the inverse, in the same dtype, of the matrix with a ridge added to its diagonal.

    What is added is up to 100 times as large if less leaves a matrix that is, due to rounding, not positive definite;
    an ``UnresolvedError`` is raised if that isn't enough.
    """
    damped_DD, diagonal_D = gram_DD.clone(), gram_DD.diagonal()
    for factor in MORE_DAMPING:
        torch.add(diagonal_D, ridge_D, alpha=factor, out=damped_DD.diagonal())
        factor_DD, problem = torch.linalg.cholesky_ex(damped_DD)
        if not problem:
            del damped_DD  # as large as the result of the next line
            return torch.cholesky_inverse(factor_DD)
        del factor_DD  # before there is another
    raise UnresolvedError
