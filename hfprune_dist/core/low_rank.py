"""LoRAP: matrices of low rank for attention, and scores of neurons from norms of what their projections read.

Source: Li et al. 2024, "LoRAP: Transformer Sub-Layers Deserve Differentiated Structured Compression" (ICML 2024), and
its code. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# What a channel counts that is always zero.
SILENT = 1e-4
# The share of the neurons, those with the lowest scores, that LoRAP's code keeps.
LOWEST_KEPT = 0.01


def channel_norms(squares_D: Tensor, windows: int) -> Tensor:
    """d_j: the root of the mean over windows of what the squares of channel j add up to in one.

    Args:
        squares_D: sums over the tokens of all windows.
    """
    return (squares_D / windows).sqrt()


def low_rank_factors(weight_OI: Tensor, norms_I: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The factors (R [rank, in], L [out, rank]) of the matrix LR of such a rank that is closest to W, where errors of a
    column count as its channel is large: of the singular value decomposition W diag(d) = U S V^T, L = U_k S_k^(1/2)
    and R = S_k^(1/2) V_k^T diag(1/d).

    U and S^2 are found as eigenvectors and eigenvalues of W diag(d^2) W^T. So LR is U_k U_k^T W, W itself at full rank;
    directions of which nothing is left (S = 0) get zeros.

    Args:
        weight_OI: [out, in], rank at most out.
        norms_I: d.
    """
    weight_OI, norms_I = weight_OI.double(), norms_I.double()
    scaled_OI = weight_OI * torch.where(norms_I == 0, SILENT, norms_I)
    squares_O, vectors_OO = torch.linalg.eigh(scaled_OI @ scaled_OI.T)
    squares_K, left_OK = squares_O.flip(0)[:rank], vectors_OO.flip(1)[:, :rank]
    smallest = torch.finfo(torch.float64).eps * len(squares_O) * squares_O[-1]
    roots_K = squares_K.clamp(min=0.0).pow(0.25)  # of the singular values
    inverse_K = torch.where(squares_K > smallest, 1 / roots_K, 0.0)
    return inverse_K[:, None] * (left_OK.T @ weight_OI), (left_OK * roots_K).contiguous()


def neuron_scores(rows: Sequence[Tensor], down_CK: Tensor, read_C: Tensor, hidden_K: Tensor) -> Tensor:
    """||d * gate row|| + ||d * up row|| + d_n ||down column|| of each neuron n [neurons].

    Args:
        rows: weights of gate and up, or of up alone where an MLP has no gate, each [neurons, hidden_size].
        read_C: d of the channels that they read.
        hidden_K: d of the neurons.
    """
    scores_K: Tensor = hidden_K * torch.linalg.vector_norm(down_CK, dim=0, dtype=torch.float64)
    for weight_KC in rows:
        scores_K = scores_K + torch.linalg.vector_norm(weight_KC.double() * read_C, dim=1)
    return scores_K


def kept_neurons(scores_K: Tensor, width: int, *, lowest_stay: bool) -> Tensor:
    """Ascending int64 indices of the neurons that stay, so many: those that score highest.

    Args:
        lowest_stay: whether the hundredth that scores lowest stays as well, and those go that follow it, as in LoRAP's
            code; where fewer stay, none but these.
    """
    order_K = scores_K.sort(stable=True).indices
    lowest = min(int(LOWEST_KEPT * len(order_K)), width) if lowest_stay else 0
    gone = len(order_K) - width
    kept_K: Tensor = torch.cat([order_K[:lowest], order_K[lowest + gone :]]).sort().values
    return kept_K.cpu()
