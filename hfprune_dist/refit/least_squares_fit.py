"""Least squares on one output projection, with a ridge chosen on held-out windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.gram import UnresolvedError
from hfprune_dist.core.least_squares import (
    RIDGES,
    LeastSquares,
    Projection,
    Ridge,
    best_resolved_ridge,
    best_ridge,
)
from hfprune_dist.distributed.gram_sums import Grams
from hfprune_dist.distributed.world import World
from hfprune_dist.refit.refitted_layers import ProjectionFit


@dataclass(frozen=True)
class Solution:
    """Result of a least-squares fit of an output projection.

    Attributes:
        fit: report of the fit.
        energy: mean over tokens of the squared norm of the projection's outputs before pruning.
        fitted_CK: weight fitted on the windows that are not held out, float32 [hidden_size, kept].
        fitted_KK: mean of h h^T over the tokens of these windows, float64 [kept, kept].
        whole_CK, whole_KK: the same on all windows.
    """

    fit: ProjectionFit
    energy: float
    fitted_CK: Tensor
    fitted_KK: Tensor
    whole_CK: Tensor
    whole_KK: Tensor


def solve(weight_CD: Tensor, grams: Grams, kept: Tensor) -> Solution:
    """Fit the kept channels of an output projection to the output of all its channels.

    Args:
        weight_CD: the projection's weight [hidden_size, channels].
        grams: Gram matrices of its channels.
        kept: ascending int64 indices of the channels that stay.

    Raises:
        UnresolvedError: if a Gram matrix isn't positive definite: that of the fitted windows with any of the ridges, or
            that of all windows with the best one.
    """
    return _solved(_problems(weight_CD, grams, kept), grams.held_out_share, RIDGES)


def solve_expert(weight_CD: Tensor, grams: Grams, kept: Tensor) -> Solution:
    """``solve`` for an expert, which may have been given few tokens, or none.

    If all its outputs on the fitted or on the held-out windows are zero, there is nothing to choose a ridge by; the
    largest one is used, which pulls towards the old weight. If its outputs are zero on both, the old weight stays.
    """
    fitted, held_out = _problems(weight_CD, grams, kept)
    can_choose = min(fitted.energy, held_out.energy) > 0
    return _solved((fitted, held_out), grams.held_out_share, RIDGES if can_choose else RIDGES[-1:])


def _solved(problems: tuple[LeastSquares, LeastSquares], held_out_share: float, ridges: Sequence[float]) -> Solution:
    fitted, held_out = problems
    best = best_ridge(fitted, held_out, ridges)
    whole = fitted.mixed(held_out, held_out_share)
    del held_out, problems
    whole_CK = whole.weight(best.ridge)
    fit = ProjectionFit(best.ridge, error_before=whole.error(whole.old_CK), error_after=whole.error(whole_CK))
    return _solution(fit, best.weight_CK, whole_CK, (fitted, whole))


def solve_together(weight_CD: Tensor, grams: Grams, kept: Tensor, world: World) -> Solution:
    """``solve``, with the same bits, where all ranks have the same problem: each solves a part. Collective.

    Raises:
        UnresolvedError: as ``solve``, on every rank.
    """
    if world.size == 1:
        return solve(weight_CD, grams, kept)
    fitted, held_out = (it.keeping(kept) for it in projections_of(weight_CD, grams, world))
    best, rank = ridge_of_all_ranks(fitted, held_out, world)
    fitted_CK = best.weight_CK if world.rank == rank else _like(fitted.old_CK)
    world.broadcast_tensor(fitted_CK, rank)
    whole = fitted.mixed(held_out, grams.held_out_share)
    del held_out
    # While the first rank solves, the last one finds out what is lost without a refit.
    before = whole.error(whole.old_CK) if world.rank == world.size - 1 else 0.0
    solved = best_ridge(whole, whole, [best.ridge]) if world.is_first else None
    after = world.broadcast(0.0 if solved is None else solved.error)
    fit = ProjectionFit(best.ridge, world.broadcast(before, world.size - 1), after)
    whole_CK = _like(whole.old_CK) if solved is None else solved.weight_CK
    world.broadcast_tensor(whole_CK, 0)
    return _solution(fit, fitted_CK, whole_CK, (fitted, whole))


def projections_of(weight_CD: Tensor, grams: Grams, world: World) -> tuple[Projection, Projection]:
    """The projection on the windows that are fitted, and on those that are held out, where all ranks have the same.

    Of their products with Gram matrices, each of the first two ranks computes one, and sends it to the others.
    Collective.
    """
    weight_CD, both = weight_CD.to(grams.fitted_DD), (grams.fitted_DD, grams.held_out_DD)
    if world.size == 1:
        fitted, held_out = (Projection(weight_CD, it) for it in both)
        return fitted, held_out
    # Those received are contiguous, as products are, whatever the weight's strides.
    products = [
        weight_CD @ gram_DD if world.rank == owner else weight_CD.new_zeros(weight_CD.shape)
        for owner, gram_DD in enumerate(both)
    ]
    for owner, product_CD in enumerate(products):
        world.broadcast_tensor(product_CD, owner)
    fitted, held_out = (Projection(weight_CD, *it) for it in zip(both, products, strict=True))
    return fitted, held_out


def ridge_of_all_ranks(fitted: LeastSquares, held_out: LeastSquares, world: World) -> tuple[Ridge, int]:
    """What ``best_ridge`` does, with each rank trying some ridges, and the rank that has its weight. Collective.

    Returns:
        The ridge and its rank; on other ranks its weight is not the one that belongs to it.

    Raises:
        UnresolvedError: as ``best_ridge``, on every rank.
    """
    own = best_resolved_ridge(fitted, held_out, RIDGES[world.rank :: world.size])
    tried = world.all_gather(None if own is None else (own.error, own.ridge))
    resolved = [(it, rank) for rank, it in enumerate(tried) if it is not None]
    if not resolved:
        raise UnresolvedError
    (error, ridge), rank = min(resolved)
    return Ridge(ridge, error, fitted.old_CK if own is None else own.weight_CK), rank


def _like(weight_CK: Tensor) -> Tensor:
    """A tensor to be overwritten with another rank's."""
    return torch.empty_like(weight_CK, memory_format=torch.contiguous_format)


def _problems(weight_CD: Tensor, grams: Grams, kept: Tensor) -> tuple[LeastSquares, LeastSquares]:
    """The problems on the windows that are fitted, and on those that are held out."""
    fitted, held_out = (
        Projection(weight_CD, gram_DD).keeping(kept) for gram_DD in (grams.fitted_DD, grams.held_out_DD)
    )
    return fitted, held_out


def _solution(
    fit: ProjectionFit, fitted_CK: Tensor, whole_CK: Tensor, problems: tuple[LeastSquares, LeastSquares]
) -> Solution:
    fitted, whole = problems
    return Solution(fit, float(whole.energy), fitted_CK.float(), fitted.gram_KK, whole_CK.float(), whole.gram_KK)
