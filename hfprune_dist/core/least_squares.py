"""Least-squares refit of an output projection: the channels that stay take over the work of those removed.

W' minimises E||y - W' h_S||^2 + sum_c r_c ||W'_c - W_c||^2 over the kept channels S, where targets y are W h, or
anything else, and r_c = ridge * (median of E[h_c^2] ||W_c||^2) / ||W_c||^2: changes count relative to a column's size,
so that the problem is the same in any units of the channels. It needs only G = E[h h^T] and E[y h_S^T]:
W' = (E[y h_S^T] + W_S R) (G[S, S] + R)^-1, R = diag(r). No bias or other parameter is added.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from hfprune_dist.core.gram import ridge_of
from hfprune_dist.core.portions import widened

# Candidate ridges, as factors on ``ridge_of``; the best one on held-out tokens is used.
RIDGES = (1e-3, 1e-2, 1e-1, 1.0, 10.0)


class Projection:
    """An output projection on some tokens, from which the problem for any choice of kept channels follows; ``gram_DD``
    is the sum (or mean) over the tokens of h h^T, float64, for all channels.
    """

    def __init__(self, weight_CD: Tensor, gram_DD: Tensor) -> None:
        self._weight_CD = widened(weight_CD)
        self._gram_DD = gram_DD
        self._outputs_CD = (self._weight_CD @ gram_DD.to(self._weight_CD)).to(gram_DD)
        self._energy = (self._outputs_CD * self._weight_CD).sum()

    def keeping(self, kept: Tensor) -> LeastSquares:
        """Return the problem in which only some channels stay, whose ascending int64 indices are given."""
        cross_CK, old_CK = self._outputs_CD[:, kept], self._weight_CD[:, kept]
        return LeastSquares(self._energy, cross_CK, self._gram_DD[kept[:, None], kept], old_CK)


@dataclass(frozen=True)
class LeastSquares:
    """The problem on some tokens, from which the weight for any ridge and the error of any weight follow.

    Sums are float64. Products and solves have the dtype of ``old_CK``, float32 for models: a solve errs as if entries
    of the Gram matrix were rounded once more, and those of models are sums of float32 products already.
    """

    energy: Tensor  # E||y||^2
    cross_CK: Tensor  # E[y h_S^T]
    gram_KK: Tensor  # E[h_S h_S^T]
    old_CK: Tensor  # the kept columns of W

    def solved(self, ridge: float | Tensor) -> tuple[Tensor, Tensor]:
        """Return the refitted weight [hidden_size, kept], the old one if the kept channels are silent; and a scalar,
        which isn't 0 if the Gram matrix with the ridge isn't positive definite: the weight is then meaningless.
        """
        energy_K = self.gram_KK.diagonal()
        ridge_K = ridge_of(ridge, energy_K, self.old_CK.square().sum(dim=0))
        damped_KK = self.gram_KK.to(self.old_CK, copy=True)
        damped_KK.diagonal().add_(ridge_K)
        factor_KK, problem = torch.linalg.cholesky_ex(damped_KK)
        del damped_KK
        right_CK = (self.cross_CK + ridge_K * self.old_CK).to(self.old_CK)
        return torch.cholesky_solve(right_CK.T, factor_KK).T.contiguous(), problem

    def error(self, weight_CK: Tensor) -> Tensor:
        """Return E||y - W' h_S||^2 / E||y||^2, the share of the targets' energy that is lost; 0 if they have none."""
        explained = (weight_CK * (2 * self.cross_CK - weight_CK @ self.gram_KK.to(weight_CK))).sum()
        return (1 - explained / self.energy).clamp(min=0).where(self.energy != 0, 0.0)

    def with_tokens_of(self, other: LeastSquares) -> LeastSquares:
        """Return the problem on the tokens of both; both must consist of sums."""
        gram_KK, cross_CK = self.gram_KK + other.gram_KK, self.cross_CK + other.cross_CK
        return LeastSquares(self.energy + other.energy, cross_CK, gram_KK, self.old_CK)


class Ridge(NamedTuple):
    """A ridge, the error of its weight on held-out tokens, and that weight, fitted on the other tokens.

    The numbers are float64, on the device; the error is infinite if there is no such ridge.
    """

    ridge: Tensor
    error: Tensor
    weight_CK: Tensor


def best_ridge(
    fitted: LeastSquares, held_out: LeastSquares, ridges: Sequence[float] = RIDGES, *, largest: Tensor | bool = False
) -> Ridge:
    """Return the ridge whose weight, fitted on some tokens, has the smallest error on others, the first of equals; or,
    if ``largest``, the last of them, since they ascend.

    Ridges are left out with which the Gram matrix isn't positive definite; larger ones may do where smaller ones don't.
    """
    best_CK = fitted.old_CK
    best = torch.full((2,), torch.inf, dtype=torch.float64, device=best_CK.device)  # its error and the ridge
    for ridge in ridges:
        weight_CK, problem = fitted.solved(ridge)
        error = held_out.error(weight_CK).double()
        is_better = ((error < best[0]) | largest) & (problem == 0)
        best = torch.stack([error, torch.full_like(error, ridge)]).where(is_better, best)
        best_CK = weight_CK.where(is_better, best_CK)
    return Ridge(best[1], best[0], best_CK)
