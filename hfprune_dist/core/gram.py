"""Gram matrices of many vectors, of which CPUs compute only one half, as they are symmetric; and damped inverses."""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.core.portions import wide_dtype, wide_product, widened

# Number of rows in a block: large enough for matrix products at full speed.
BLOCK = 256
# Factors on the damping, which are tried in turn until the damped matrix is positive definite.
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


def damping_of(diagonal_D: Tensor, damping: float) -> Tensor:
    """Return ``damping`` times the mean of a diagonal, or ``damping`` itself if that mean is 0."""
    mean = diagonal_D.mean()
    return damping * mean.where(mean != 0, 1.0)


def damped_inverse(gram_DD: Tensor, damping: float) -> Tensor:
    """Return the inverse, in the same dtype, of the matrix with ``damping_of`` its diagonal added to the diagonal.

    What is added is up to 100 times as large if less leaves a matrix that is, due to rounding, not positive definite;
    an ``UnresolvedError`` is raised if that isn't enough.
    """
    damped_DD, diagonal_D = gram_DD.clone(), gram_DD.diagonal()
    for factor in MORE_DAMPING:
        torch.add(diagonal_D, damping_of(diagonal_D, factor * damping), out=damped_DD.diagonal())
        factor_DD, problem = torch.linalg.cholesky_ex(damped_DD)
        if not problem:
            del damped_DD  # as large as the result of the next line
            return torch.cholesky_inverse(factor_DD)
        del factor_DD  # before there is another
    raise UnresolvedError
