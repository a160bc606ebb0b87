"""Least squares on one output projection, with a ridge chosen on held-out windows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.least_squares import RIDGES, Projection, best_ridge
from hfprune_dist.distributed.sums import Grams
from hfprune_dist.distributed.world import World


@dataclass(frozen=True)
class ProjectionFit:
    """What least squares did to one output projection, or to those of all experts of a layer.

    Attributes:
        ridge: chosen on held-out windows; for experts, the median.
        error_before: the share of its target's energy that is lost before the refit.
        error_after: the share that is still lost after least squares.
    """

    ridge: float
    error_before: float
    error_after: float


@dataclass(frozen=True)
class Solution:
    """Result of a least-squares fit of an output projection.

    Attributes:
        fit: report of the fit.
        energy: mean over tokens of the squared norm of the projection's outputs before pruning.
        fitted_CK: weight fitted on the windows that are not held out, float32 [hidden_size, kept].
        whole_CK: the same on all windows.
    """

    fit: ProjectionFit
    energy: float
    fitted_CK: Tensor
    whole_CK: Tensor


def solve(weight_CD: Tensor, grams: Grams, kept: Tensor, *, expert: bool = False) -> Solution:
    """Fit the kept channels of an output projection to the output of all its channels.

    Args:
        weight_CD: the projection's weight [hidden_size, channels].
        grams: Gram matrices of its channels.
        kept: ascending int64 indices of the channels that stay.
        expert: whether few tokens, or none, may have reached the projection. If all its outputs on the fitted or on the
            held-out windows are zero, there is nothing to choose a ridge by; the largest one is used, which pulls
            towards the old weight. If they are zero on both, the old weight stays.

    Raises:
        UnresolvedError: if a Gram matrix isn't positive definite: that of the fitted windows with any of the ridges, or
            that of all windows with the best one.
    """
    fitted, held_out = (Projection(weight_CD, it).keeping(kept) for it in (grams.fitted_DD, grams.held_out_DD))
    can_choose = not expert or min(fitted.energy, held_out.energy) > 0
    best = best_ridge(fitted, held_out, RIDGES if can_choose else RIDGES[-1:])
    whole = fitted.mixed(held_out, grams.held_out_share)
    del fitted, held_out
    whole_CK = whole.weight(best.ridge)
    fit = ProjectionFit(best.ridge, error_before=whole.error(whole.old_CK), error_after=whole.error(whole_CK))
    return Solution(fit, float(whole.energy), best.weight_CK.float(), whole_CK.float())


def solve_on_rank0(weight_CD: Tensor, grams: Grams, kept: Tensor, world: World) -> Solution:
    """``solve`` on rank 0, and give every rank the solution. Collective."""
    if world.is_first:
        solution = solve(weight_CD, grams, kept)
        weights = [solution.fitted_CK.contiguous(), solution.whole_CK.contiguous()]
    else:
        empty_CK = weight_CD.new_empty(len(weight_CD), len(kept), dtype=torch.float32)
        weights = [empty_CK, empty_CK.clone()]
    fit, energy = world.on_rank0(lambda: (solution.fit, solution.energy))
    for weight_CK in weights:
        world.broadcast_tensor(weight_CK, 0)
    return Solution(fit, energy, *weights)
