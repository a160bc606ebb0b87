"""Least squares on the down projection: the neurons that stay take over what the removed ones did.

W' minimises E||W h - W' h_S||^2 + ridge * mean(diag G[S, S]) * ||W' - W_S||^2 over the kept neurons S, which needs only
G = E[h h^T]: W' = (W G[:, S] + ridge' W_S) (G[S, S] + ridge' I)^-1. No bias, no new parameter.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Shares of the kept neurons' mean energy among which held-out tokens choose.
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)


def refit_down_projection(weight_CD: Tensor, gram_DD: Tensor, kept: Tensor, ridge: float) -> Tensor:
    """The refitted weight [hidden_size, kept], float64.

    Args:
        weight_CD: the layer's weight before pruning [hidden_size, intermediate_size].
        gram_DD: float64, the mean (or sum) of h h^T over tokens, of all neurons.
        kept: ascending int64 indices of those that stay.
        ridge: share of the kept neurons' mean of h^2 that pulls towards the old weight.
    """
    weight_CD = weight_CD.to(gram_DD)
    kept_gram = gram_DD[kept][:, kept]
    strength = ridge * kept_gram.diagonal().mean()
    kept_gram.diagonal().add_(strength)
    target = weight_CD @ gram_DD[:, kept] + strength * weight_CD[:, kept]
    return torch.cholesky_solve(target.T, torch.linalg.cholesky(kept_gram)).T.contiguous()


def output_error(weight_CD: Tensor, gram_DD: Tensor, kept: Tensor, new_weight: Tensor) -> float:
    """E||W h - W' h_S||^2 / E||W h||^2 on the tokens of ``gram_DD``: the share of the output's energy that is lost."""
    weight_CD = weight_CD.to(gram_DD)
    difference_CD = weight_CD.index_add(1, kept, new_weight.to(gram_DD), alpha=-1)
    energy = ((weight_CD @ gram_DD) * weight_CD).sum()
    return float(((difference_CD @ gram_DD) * difference_CD).sum() / energy)


def best_ridge(
    weight_CD: Tensor, gram_DD: Tensor, held_out_DD: Tensor, kept: Tensor, ridges: Sequence[float] = RIDGES
) -> float:
    """The ridge whose refit on ``gram_DD`` has the smallest error on the tokens of ``held_out_DD``."""
    errors = [
        output_error(weight_CD, held_out_DD, kept, refit_down_projection(weight_CD, gram_DD, kept, ridge))
        for ridge in ridges
    ]
    return ridges[errors.index(min(errors))]


def weight_of_targets(kept_CK: Tensor) -> Tensor:
    """The weight W [hidden_size, kept + hidden_size] that makes targets y of vectors v = [h_S; y - W_S h_S].

    So fitting W' h_S to any targets is a refit with the Gram matrix of such vectors, S their first entries.
    """
    return torch.cat([kept_CK, torch.eye(len(kept_CK)).to(kept_CK)], dim=1)


def vectors_of_targets(kept_CK: Tensor, hidden_NK: Tensor, target_NC: Tensor) -> Tensor:
    """The vectors [tokens, kept + hidden_size], float32, of which ``weight_of_targets`` makes ``target_NC``."""
    hidden_NK = hidden_NK.float()
    return torch.cat([hidden_NK, target_NC.float() - hidden_NK @ kept_CK.float().T], dim=1)
