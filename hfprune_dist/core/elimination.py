"""Removing neurons one after another while those that stay take over their work: structured optimal brain surgeon.

Where the other neurons of a layer are refitted by least squares, removing neuron n leaves an error along its column
w_n of the down projection, as large as the part of h_n that the others can't express: E[residual^2] = 1 / [G^-1]_nn,
G = E[h h^T]. With F = E[g g^T], g the gradient of log p(y) at the MLP's output, y drawn from p, that costs in KL
divergence per token, to second order and with F and G taken as independent,

    cost_n = 1/2 (w_n^T F w_n) / [G^-1]_nn    (nats)

The columns that stay absorb what was removed, so costs change from removal to removal. Costs of different layers are
in the same unit and can be compared. Source: The LLM Surgeon (arXiv 2312.17244), after Hassibi and Stork (1992).

F and G aren't quite independent. The exact Fisher score of a neuron, E[(h_n dlog p(y)/dh_n)^2], would be
G_nn (w_n^T F w_n) if they were; where it differs, w_n^T F w_n of the original column is moved to the geometric mean of
the two: all the way would trust a noisy estimate too much.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hfprune_dist.core.gram import damped_inverse

# Neurons removed between two updates of the costs; and such updates that wait to be applied to whole matrices at once.
BLOCK, WAITING = 8, 8
# Added to the diagonal of G, as a share of its mean: samples are finite.
RIDGE = 1e-2
# A correction leaves at least this share of a neuron's cost.
LEAST_SHARE = 0.1


def elimination_scores(
    gram_DD: Tensor, curvature_CC: Tensor, weight_CD: Tensor, fisher_D: Tensor, block: int = BLOCK
) -> Tensor:
    """Score every neuron of a layer by the cost of its removal after all cheaper ones.

    Args:
        gram_DD: float64 [intermediate_size, intermediate_size], the mean of h h^T over tokens.
        curvature_CC: float64 [hidden_size, hidden_size], the mean of g g^T over tokens.
        weight_CD: the down projection's weight [hidden_size, intermediate_size].
        fisher_D: float64 [intermediate_size], the mean of (h dlog p(y)/dh)^2 over tokens.
        block: neurons removed between two updates of the costs.

    Returns:
        float64 [intermediate_size], nats per token, rising strictly in the order of removal: the ``width`` highest
        scores are what is left after all other removals.
    """
    order_D, cost_D = eliminate(gram_DD, curvature_CC, weight_CD, fisher_D, block)
    # A removal may be cheaper than the one before it, which made it so: the later one counts as dear as the earlier.
    rising_D = cost_D.cummax(dim=0).values
    ranks_D = torch.arange(1, len(order_D) + 1, dtype=torch.float64, device=cost_D.device)
    rising_D = rising_D * (1 + 1e-12 * ranks_D) + 1e-300 * ranks_D  # ties keep their order
    return torch.empty_like(rising_D).scatter_(0, order_D, rising_D)


def eliminate(
    gram_DD: Tensor, curvature_CC: Tensor, weight_CD: Tensor, fisher_D: Tensor, block: int
) -> tuple[Tensor, Tensor]:
    """Remove all neurons, the cheapest next; arguments as for ``elimination_scores``.

    Returns:
        Order of removal (int64 [intermediate_size]), and what each removal costs when its turn comes.
    """
    energy_D = gram_DD.diagonal()
    if not energy_D.any():  # a silent MLP, of which no removal costs anything
        return torch.arange(len(gram_DD), device=gram_DD.device), torch.zeros_like(energy_D)
    inverse = _Shrinking(damped_inverse(gram_DD, RIDGE))
    weight_CD = weight_CD.to(gram_DD)
    curvature = _Shrinking(weight_CD.T @ (curvature_CC @ weight_CD))
    del weight_CD
    correction_D = _correction(curvature.diagonal_D, energy_D, fisher_D.to(gram_DD))
    left_D = torch.arange(len(gram_DD), device=gram_DD.device)
    gone_D = torch.zeros_like(left_D, dtype=torch.bool)
    order, costs = [], []
    for start in range(0, len(gram_DD), block):
        curvature_D = curvature.diagonal_D
        cost_D = 0.5 * torch.maximum(curvature_D + correction_D, LEAST_SHARE * curvature_D) / inverse.diagonal_D
        candidates = (~gone_D).nonzero().flatten()
        gone = candidates[cost_D[candidates].sort(stable=True).indices[:block]]
        order.append(left_D[gone])
        costs.append(cost_D[gone])
        # Block elimination: P - P[:, gone] P[gone, gone]^-1 P[gone, :] is the inverse of G without the removed.
        rows_BD = inverse.rows(gone)
        absorbed_BD = torch.linalg.solve(rows_BD[:, gone], rows_BD)
        inverse.subtract(absorbed_BD.T, rows_BD)
        # The columns that stay become W - W[:, gone] absorbed, W^T F W accordingly.
        curved_BD = curvature.rows(gone)
        half_BD = curved_BD - 0.5 * curved_BD[:, gone] @ absorbed_BD
        curvature.subtract(torch.cat([absorbed_BD, half_BD]).T, torch.cat([half_BD, absorbed_BD]))
        gone_D[gone] = True
        if (start // block + 1) % WAITING == 0:
            stay_S = (~gone_D).nonzero().flatten()
            inverse.keep(stay_S)
            curvature.keep(stay_S)
            left_D, correction_D, gone_D = left_D[stay_S], correction_D[stay_S], gone_D[stay_S]
    return torch.cat(order), torch.cat(costs)


class _Shrinking:
    """A symmetric matrix over the neurons that are left, less products that are taken away a few at a time.

    Applying a product to the whole matrix costs a pass over it, so products wait for each other; meanwhile the diagonal
    is kept up to date, and rows are corrected when they are read.
    """

    def __init__(self, matrix_DD: Tensor) -> None:
        self.diagonal_D = matrix_DD.diagonal().clone()
        self._matrix_DD = matrix_DD
        self._waiting: list[tuple[Tensor, Tensor]] = []

    def rows(self, indices: Tensor) -> Tensor:
        """Some rows as they are now, [len(indices), size]."""
        rows_BD = self._matrix_DD.index_select(0, indices)
        for left_DR, right_RD in self._waiting:
            rows_BD.addmm_(left_DR.index_select(0, indices), right_RD, alpha=-1)
        return rows_BD

    def subtract(self, left_DR: Tensor, right_RD: Tensor) -> None:
        """Take a product away that is symmetric."""
        self.diagonal_D -= (left_DR.T * right_RD).sum(dim=0)
        self._waiting.append((left_DR, right_RD))

    def keep(self, stay_S: Tensor) -> None:
        """Forget the neurons that don't stay, and apply what waits."""
        left_SR = torch.cat([left_DR for left_DR, _ in self._waiting], dim=1).index_select(0, stay_S)
        right_RS = torch.cat([right_RD for _, right_RD in self._waiting]).index_select(1, stay_S)
        self._matrix_DD = self._matrix_DD.index_select(0, stay_S)
        self._matrix_DD = self._matrix_DD.index_select(1, stay_S).addmm_(left_SR, right_RS, alpha=-1)
        self.diagonal_D = self.diagonal_D[stay_S]
        self._waiting = []


def _correction(curvature_D: Tensor, energy_D: Tensor, fisher_D: Tensor) -> Tensor:
    """What takes w^T F w of the original columns to the geometric mean of itself and the exact Fisher score / G_nn."""
    exact_D = fisher_D / energy_D.clamp(min=torch.finfo(energy_D.dtype).tiny)
    return (exact_D * curvature_D).sqrt() - curvature_D
