"""Least squares on one output projection, with the ridge that held-out windows choose."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from hfprune_dist.core.least_squares import LeastSquares, best_ridge
from hfprune_dist.distributed.gram_sums import Grams
from hfprune_dist.refit.refitted_layers import ProjectionFit


@dataclass(frozen=True)
class Solution:
    """Weights of an output projection by least squares, float32 [hidden_size, kept]; and the float64 mean of h h^T
    [kept, kept].

    Attributes:
        fitted_CK, fitted_KK: on the windows that are not held out.
        whole_CK, whole_KK: on all windows.
    """

    fit: ProjectionFit
    fitted_CK: Tensor
    fitted_KK: Tensor
    whole_CK: Tensor
    whole_KK: Tensor


def solve(weight_CD: Tensor, grams: Grams, kept: Tensor) -> Solution:
    """Fit the kept channels of an output projection to what all of them put out.

    Args:
        weight_CD: of the projection [hidden_size, channels].
        grams: of its channels.
        kept: ascending int64 indices of the channels that stay.
    """
    fitted, held_out = (LeastSquares(weight_CD, gram_DD, kept) for gram_DD in (grams.fitted_DD, grams.held_out_DD))
    ridge, fitted_CK = best_ridge(fitted, held_out)
    whole = fitted.mixed(held_out, grams.held_out_share)
    del held_out
    whole_CK = whole.weight(ridge)
    return Solution(
        ProjectionFit(ridge, error_before=whole.error(whole.old_CK), error_after=whole.error(whole_CK)),
        fitted_CK.float(),
        fitted.gram_KK,
        whole_CK.float(),
        whole.gram_KK,
    )
