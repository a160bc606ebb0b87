"""Least squares on one output projection, with a ridge chosen on held-out windows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from hfprune_dist.core.least_squares import RIDGES, Projection, best_ridge
from hfprune_dist.distributed.sums import Grams
from hfprune_dist.distributed.world import World


class Solution(NamedTuple):
    """An output projection's new weight [hidden_size, kept], float32.

    Attributes:
        fitted_CK: fitted on the windows that are not held out.
        whole_CK: the same on all windows.
    """

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
    whole = fitted.with_tokens_of(held_out)
    del fitted, held_out
    return Solution(best.weight_CK.float().contiguous(), whole.weight(best.ridge).float().contiguous())


def solve_on_rank0(weight_CD: Tensor, grams: Grams, kept: Tensor, world: World) -> Solution:
    """``solve`` on rank 0, and give every rank the solution. Collective."""
    if world.is_first:
        solution = solve(weight_CD, grams, kept)
    else:
        solution = Solution(*weight_CD.new_empty(2, len(weight_CD), len(kept), dtype=torch.float32))
    for weight_CK in solution:
        world.broadcast_tensor(weight_CK, 0)
    return solution
