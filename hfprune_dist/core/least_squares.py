"""Least squares on an output projection: the channels that stay take over what the removed ones did.

W' minimises E||W h - W' h_S||^2 + ridge * mean(diag G[S, S]) * ||W' - W_S||^2 over the kept channels S, which needs
only G = E[h h^T]: W' = (W G[:, S] + ridge' W_S) (G[S, S] + ridge' I)^-1. No bias, no new parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor

# Shares of the kept channels' mean energy among which held-out tokens choose.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


class LeastSquares:
    """The problem on some tokens, from which every ridge's weight and any weight's error follow.

    Args:
        weight_CD: the layer's weight before pruning [hidden_size, channels].
        gram_DD: float64, the mean (or sum) of h h^T over tokens, of all channels; not held on to.
        kept: ascending int64 indices of those that stay.

    Attributes:
        old_CK: the columns of ``weight_CD`` that stay.
        gram_KK: what ``gram_DD`` has of the channels that stay.
    """

    def __init__(self, weight_CD: Tensor, gram_DD: Tensor, kept: Tensor) -> None:
        weight_CD = weight_CD.to(gram_DD)
        outputs_CD = weight_CD @ gram_DD  # E[W h h^T]
        self._energy = (outputs_CD * weight_CD).sum()
        self._cross_CK = outputs_CD[:, kept]
        self.gram_KK = gram_DD[kept[:, None], kept]
        self.old_CK = weight_CD[:, kept]

    def weight(self, ridge: float) -> Tensor:
        """The refitted weight [hidden_size, kept], float64; the old one where the kept channels are silent.

        Args:
            ridge: share of the kept channels' mean of h^2 that pulls towards the old weight.
        """
        energy = self.gram_KK.diagonal().mean()
        if energy == 0:
            return self.old_CK.clone()
        strength = ridge * energy
        damped_KK = self.gram_KK.clone()
        damped_KK.diagonal().add_(strength)
        factor_KK = torch.linalg.cholesky(damped_KK)
        del damped_KK
        right_CK = self._cross_CK + strength * self.old_CK
        return torch.cholesky_solve(right_CK.T, factor_KK).T.contiguous()

    def error(self, weight_CK: Tensor) -> float:
        """E||W h - W' h_S||^2 / E||W h||^2: the share of the output's energy that is lost; 0 where there is none."""
        if self._energy == 0:
            return 0.0
        explained = (weight_CK * (2 * self._cross_CK - weight_CK @ self.gram_KK)).sum()
        return float((1 - explained / self._energy).clamp(min=0))

    def mixed(self, other: LeastSquares, share: float) -> LeastSquares:
        """The same problem on the tokens of both, where both have means; ``share`` of them are the other's."""
        both = copy(self)
        both._energy = self._energy.lerp(other._energy, share)
        both._cross_CK = self._cross_CK.lerp(other._cross_CK, share)
        both.gram_KK = self.gram_KK.lerp(other.gram_KK, share)
        return both


@dataclass(frozen=True)
class Ridge:
    """A ridge that was tried.

    Attributes:
        error: of its weight on tokens that are held out.
        weight_CK: fitted on the others.
    """

    ridge: float
    error: float
    weight_CK: Tensor


def best_ridge(fitted: LeastSquares, held_out: LeastSquares, ridges: Sequence[float] = RIDGES) -> Ridge:
    """The ridge whose weight, fitted on some tokens, has the smallest error on others; of equals the first."""
    best: Ridge | None = None
    for ridge in ridges:
        weight_CK = fitted.weight(ridge)
        error = held_out.error(weight_CK)
        if best is None or error < best.error:
            best = Ridge(ridge, error, weight_CK)
    assert best is not None, "no ridge to try"
    return best


def weight_of_targets(kept_CK: Tensor) -> Tensor:
    """The weight W [hidden_size, kept + hidden_size] that makes targets y of vectors v = [h_S; y - W_S h_S].

    So fitting W' h_S to any targets is a refit with the Gram matrix of such vectors, S their first entries.
    """
    return torch.cat([kept_CK, torch.eye(len(kept_CK)).to(kept_CK)], dim=1)


def vectors_of_targets(kept_CK: Tensor, hidden_NK: Tensor, target_NC: Tensor) -> Tensor:
    """The vectors [tokens, kept + hidden_size], float32, of which ``weight_of_targets`` makes ``target_NC``."""
    hidden_NK = hidden_NK.float()
    return torch.cat([hidden_NK, target_NC.float() - hidden_NK @ kept_CK.float().T], dim=1)
