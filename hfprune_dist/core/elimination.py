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

# Neurons removed between two updates of the costs.
BLOCK = 8
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
    inverse_DD = torch.linalg.inv(gram_DD + RIDGE * gram_DD.diagonal().mean() * torch.eye(len(gram_DD)).to(gram_DD))
    weight_CD = weight_CD.to(gram_DD)
    bent_CD = curvature_CC @ weight_CD
    correction_D = _correction((weight_CD * bent_CD).sum(dim=0), gram_DD.diagonal(), fisher_D.to(gram_DD))
    left_D = torch.arange(len(gram_DD), device=gram_DD.device)
    order, costs = [], []
    while len(left_D):
        bending_D = (weight_CD * bent_CD).sum(dim=0)
        cost_D = 0.5 * torch.maximum(bending_D + correction_D, LEAST_SHARE * bending_D) / inverse_DD.diagonal()
        gone = cost_D.sort(stable=True).indices[:block]
        order.append(left_D[gone])
        costs.append(cost_D[gone])
        stay = torch.ones(len(left_D), dtype=torch.bool, device=left_D.device).index_fill_(0, gone, False)
        # Block elimination: P - P[:, gone] P[gone, gone]^-1 P[gone, :] is the inverse of G without the removed.
        absorbed_DB = torch.linalg.solve(inverse_DD[gone][:, gone], inverse_DD[gone][:, stay]).T
        weight_CD = weight_CD[:, stay] - weight_CD[:, gone] @ absorbed_DB.T
        bent_CD = bent_CD[:, stay] - bent_CD[:, gone] @ absorbed_DB.T
        inverse_DD = inverse_DD[stay][:, stay] - absorbed_DB @ inverse_DD[gone][:, stay]
        left_D, correction_D = left_D[stay], correction_D[stay]
    return torch.cat(order), torch.cat(costs)


def _correction(bending_D: Tensor, energy_D: Tensor, fisher_D: Tensor) -> Tensor:
    """What takes w^T F w of the original columns to the geometric mean of itself and the exact Fisher score / G_nn."""
    exact_D = fisher_D / energy_D.clamp(min=torch.finfo(energy_D.dtype).tiny)
    return (exact_D * bending_D).sqrt() - bending_D
