"""Removal of units one by one while the remaining ones take over their work: structured optimal brain surgeon.

If the other units of a layer are refitted by least squares, removing unit u leaves an error along its columns W_u of
the output projection: the part of its channels h_u that the others can't express, with second moments
E_u = ([G^-1]_uu)^-1, G = E[h h^T]. With F = E[g g^T], g the gradient of log p(y) at the projection's output, y drawn
from p, the cost in KL divergence per token is, to second order and with g and h taken as independent,

    cost_u = 1/2 tr(E_u W_u^T F W_u)    (nats)

For a unit of one channel, E_u = 1 / [G^-1]_uu is a number. The columns that stay absorb what was removed, so costs
change from removal to removal. Costs of different layers are in the same unit of measure and can be compared. Source:
The LLM Surgeon (arXiv 2312.17244), after Hassibi and Stork (1992).

g and h aren't quite independent. The exact Fisher score of a unit, E[(h_u . dlog p(y)/dh_u)^2], would be
tr(G_uu W_u^T F W_u) if they were; where it differs, W_u^T F W_u of the original columns is scaled to the geometric mean
of the two, since scaling all the way would trust a noisy estimate too much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.core.gram import UnresolvedError, damped_inverse, ridge_of
from hfprune_dist.core.portions import wide_dtype
from hfprune_dist.core.selection import entries_of

# Number of channels, in whole units, removed between two updates of the costs; and number of such updates that are
# collected and then applied to the whole matrices at once.
BLOCK, WAITING = 8, 8
# Factor on the ridge of G, since the sample is finite; a channel's weight in it is W_c^T F W_c. Layers 11 and 28 of
# SmolLM2-135M have channels of 1e5 times the median energy. Without half of their neurons, KL was .0063 and .0189; with
# ridges in proportion to energies .0064 and .0222; with one for all channels .0067, foreseen as .310, and .0191.
RIDGE = 0.1
# Smallest share of a unit's cost that a correction may leave.
LEAST_SHARE = 0.1


def elimination_scores(gram_DD: Tensor, curvature_CC: Tensor, weight_CD: Tensor, fisher_U: Tensor) -> Tensor:
    """Score every unit of a layer by the cost of its removal after all cheaper ones.

    Args:
        gram_DD: float64, the mean of h h^T over tokens; every unit has the same number of consecutive channels.
        curvature_CC: float64, the mean of g g^T over tokens.
        weight_CD: the output projection's weight.
        fisher_U: float64, the mean over tokens of (the sum of h dlog p(y)/dh over a unit's channels)^2.

    Returns:
        float64 [units], nats per token, strictly increasing in the order of removal: the units with the ``n`` highest
        scores are those left after all others have been removed.

    Raises:
        UnresolvedError: if the Gram matrix is mostly rounding errors.
    """
    order_U, cost_U = eliminate(gram_DD, curvature_CC, weight_CD, fisher_U)
    # A removal may be made cheaper by the one before it; it then scores as high as that one.
    rising_U = cost_U.cummax(dim=0).values
    ranks_U = torch.arange(1, len(order_U) + 1, dtype=torch.float64, device=cost_U.device)
    rising_U = rising_U * (1 + 1e-12 * ranks_U) + 1e-300 * ranks_U  # ties keep their order
    return torch.empty_like(rising_U).scatter_(0, order_U, rising_U)


def eliminate(gram_DD: Tensor, curvature_CC: Tensor, weight_CD: Tensor, fisher_U: Tensor) -> tuple[Tensor, Tensor]:
    """Remove all units, the cheapest first, ``BLOCK`` channels between two updates of the costs. Return their order,
    int64 [units], and costs in that order, float64, nats per token; raises UnresolvedError as ``damped_inverse``.

    All is computed in the weight's ``wide_dtype``. What a removal subtracts from a diagonal entry of G^-1 is never more
    than that entry, so float32 keeps its digits.
    """
    units, device = len(fisher_U), gram_DD.device
    channels = len(gram_DD) // units
    block = max(1, BLOCK // channels)
    energy_D = gram_DD.diagonal().to(device, wide_dtype(weight_CD.dtype))
    weight_CD = weight_CD.to(energy_D).masked_fill(energy_D == 0, 0.0)  # columns of silent channels cost nothing
    gram_DD, curvature_CC = gram_DD.to(weight_CD), curvature_CC.to(weight_CD)
    curved_Ucc = _product_blocks(weight_CD.T, curvature_CC @ weight_CD, channels)  # the units' blocks of W^T F W
    ridge_D = ridge_of(RIDGE, energy_D, curved_Ucc.diagonal(dim1=1, dim2=2).flatten().clamp(min=0))
    inverse = _Shrinking(damped_inverse(gram_DD, ridge_D), channels)
    correction_Ucc = _correction(curved_Ucc, _diagonal_blocks(gram_DD, channels), fisher_U.to(weight_CD))
    left_U = torch.arange(units, device=device)
    gone_U = torch.zeros_like(left_U, dtype=torch.bool)
    order, costs = [], []
    for start in range(0, units, block):
        candidates = _staying(gone_U, units - start)
        inverse_Ucc, weighed_Ucc = inverse.blocks_Ucc[candidates], curved_Ucc[candidates]
        corrected_U = _traces(inverse_Ucc, weighed_Ucc + correction_Ucc[candidates])
        cost_U = 0.5 * torch.maximum(corrected_U, _traces(inverse_Ucc, LEAST_SHARE * weighed_Ucc))
        cheapest = cost_U.sort(stable=True).indices[:block]
        gone = candidates[cheapest]
        order.append(left_U[gone])
        costs.append(cost_U[cheapest])
        gone_U[gone] = True
        gone_B = entries_of(gone, channels)
        absorbed_BD = inverse.without(gone_B)
        # The columns that stay become W - W[:, gone] absorbed, W^T F W accordingly.
        columns_CB = weight_CD.index_select(1, gone_B)
        curved_BD = (curvature_CC @ columns_CB).T @ weight_CD
        half_BD = curved_BD - 0.5 * curved_BD[:, gone_B] @ absorbed_BD
        curved_Ucc -= _product_blocks(torch.cat([absorbed_BD, half_BD]).T, torch.cat([half_BD, absorbed_BD]), channels)
        weight_CD.addmm_(columns_CB, absorbed_BD, alpha=-1)
        if (start // block + 1) % WAITING == 0:
            stay_S = _staying(gone_U, units - start - len(gone))
            inverse.keep(stay_S)
            weight_CD = weight_CD.index_select(1, entries_of(stay_S, channels))
            left_U, curved_Ucc, correction_Ucc, gone_U = (
                tensor[stay_S] for tensor in (left_U, curved_Ucc, correction_Ucc, gone_U)
            )
    inverse.require_solved()
    return torch.cat(order), torch.cat(costs).double()


def _staying(gone_U: Tensor, count: int) -> Tensor:
    """The numbers of the units that aren't gone, of which there are ``count``: so the host need not wait to count."""
    return gone_U.to(torch.uint8).argsort(stable=True)[:count]


class _Shrinking:
    """The inverse of G over the remaining channels, from which products are subtracted a few at a time.

    Subtracting a product from the whole matrix costs a pass over it, so products are collected first; meanwhile the
    units' blocks on the diagonal are kept up to date, and rows are corrected when they are read.
    """

    def __init__(self, matrix_DD: Tensor, channels: int) -> None:
        self.blocks_Ucc = _diagonal_blocks(matrix_DD, channels).clone()
        self._channels = channels
        self._matrix_DD = matrix_DD
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._problems: list[Tensor] = []

    def without(self, gone_B: Tensor) -> Tensor:
        """Make it the inverse of G without some channels; return how the others take over their work [gone, size]."""
        rows_BD = self._matrix_DD.index_select(0, gone_B)
        for left_DR, right_RD in self._waiting:
            rows_BD.addmm_(left_DR.index_select(0, gone_B), right_RD, alpha=-1)
        # Block elimination: P - P[:, gone] P[gone, gone]^-1 P[gone, :] is the inverse of G without those removed.
        absorbed_BD: Tensor
        absorbed_BD, problem = torch.linalg.solve_ex(rows_BD[:, gone_B], rows_BD)
        self._problems.append(problem)
        self.blocks_Ucc -= _product_blocks(absorbed_BD.T, rows_BD, self._channels)
        self._waiting.append((absorbed_BD.T, rows_BD))
        return absorbed_BD

    def require_solved(self) -> None:
        """Raise ``UnresolvedError`` if one of the solves so far has failed; the host would wait if it asked each."""
        if self._problems and torch.stack(self._problems).any():
            raise UnresolvedError
        self._problems = []

    def keep(self, stay_S: Tensor) -> None:
        """Drop the units that don't stay, and apply the collected products."""
        self.require_solved()
        channels = entries_of(stay_S, self._channels)
        left_SR = torch.cat([left_DR for left_DR, _ in self._waiting], dim=1).index_select(0, channels)
        right_RS = torch.cat([right_RD for _, right_RD in self._waiting]).index_select(1, channels)
        self._matrix_DD = self._matrix_DD.index_select(0, channels)
        self._matrix_DD = self._matrix_DD.index_select(1, channels).addmm_(left_SR, right_RS, alpha=-1)
        self.blocks_Ucc = self.blocks_Ucc[stay_S]
        self._waiting = []


# Blocks of one channel are plain numbers: the only case in most models, and much cheaper without matrix products.


def _diagonal_blocks(matrix_DD: Tensor, channels: int) -> Tensor:
    """Return the units' blocks on a matrix's diagonal [units, channels, channels]."""
    by_unit_UcUc = matrix_DD.unflatten(1, (-1, channels)).unflatten(0, (-1, channels))
    blocks_ccU: Tensor = by_unit_UcUc.diagonal(dim1=0, dim2=2)
    return blocks_ccU.permute(2, 0, 1)


def _product_blocks(left_DR: Tensor, right_RD: Tensor, channels: int) -> Tensor:
    """Return the units' blocks on the diagonal of a product."""
    if channels == 1:
        return (left_DR.T * right_RD).sum(dim=0)[:, None, None]
    blocks_Ucc: Tensor = left_DR.unflatten(0, (-1, channels)) @ right_RD.unflatten(1, (-1, channels)).transpose(0, 1)
    return blocks_Ucc


def _traces(inverse_Ucc: Tensor, matrix_Ucc: Tensor) -> Tensor:
    """Return tr(inverse^-1 matrix) for each unit's blocks."""
    if inverse_Ucc.shape[1] == 1:
        return (matrix_Ucc / inverse_Ucc).flatten()
    # Cholesky, since batches of general solves hang in oneMKL with several threads (torch 2.13, blocks of 192).
    factors_Ucc, problems_U = torch.linalg.cholesky_ex(inverse_Ucc)
    if problems_U.any():
        raise UnresolvedError
    products_Ucc: Tensor = torch.cholesky_solve(matrix_Ucc, factors_Ucc)
    return products_Ucc.diagonal(dim1=1, dim2=2).sum(dim=1)


def _correction(curvature_Ucc: Tensor, gram_Ucc: Tensor, fisher_U: Tensor) -> Tensor:
    """Return the term that turns W^T F W of the original columns into its geometric mean with exact Fisher scores.

    A unit too quiet for the Gram matrix, whose terms are rounded, may still have a Fisher score; it counts as silent.
    Rounding can make W^T F W negative where it is 0, as for columns that no gradient touches.
    """
    if gram_Ucc.shape[1] == 1:
        exact_Ucc = _quotient(fisher_U[:, None, None], gram_Ucc)
        return (exact_Ucc * curvature_Ucc.clamp(min=0)).sqrt() - curvature_Ucc
    independent_U = (gram_Ucc * curvature_Ucc).sum(dim=(1, 2))
    share_U = _quotient(fisher_U, independent_U).sqrt()
    return (share_U - 1)[:, None, None] * curvature_Ucc


def _quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """Return numerator / denominator, or 0 where the denominator is not positive."""
    return torch.where(denominator > 0, numerator / denominator, 0.0)
