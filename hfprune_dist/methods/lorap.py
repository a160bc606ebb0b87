"""LoRAP: attention's matrices become products of two of low rank, and neurons go whose weights, times what they read,
are small (Li et al. 2024, "LoRAP: Transformer Sub-Layers Deserve Differentiated Structured Compression", ICML 2024).

Layer after layer, in the model as compressed so far (``refit.low_rank``). d_j is the root of the mean over windows
of the sum of squares of channel j in a window. As in the authors' code, the hundredth of the neurons that scores lowest
stays as well. Everything is float64.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# Norm used for a channel that is always zero.
SILENT = 1e-4
# Share of the neurons, those with the lowest scores, that stay.
LOWEST_KEPT = 0.01


def channel_norms(squares_D: Tensor, windows: int) -> Tensor:
    """Return d from the sums of squares over the tokens of all windows."""
    return (squares_D / windows).sqrt()


def low_rank_factors(weight_OI: Tensor, norms_I: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the factors (R [rank, in], L [out, rank]) of the matrix LR of this rank that is closest to W, with errors
    in each column weighted by d, the ``norms_I``: from the singular value decomposition W diag(d) = U S V^T,
    L = U_k S_k^(1/2) and R = S_k^(1/2) V_k^T diag(1/d).

    U and S^2 are computed as eigenvectors and eigenvalues of W diag(d^2) W^T. So LR is U_k U_k^T W, and W itself at
    full rank; directions with S = 0 get zeros.
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
    """Return ||d * gate row|| + ||d * up row|| + d_n ||down column|| for each neuron n, float64 [neurons].

    Args:
        rows: weights of gate and up, or only of up if the MLP has no gate; read_C is d of the channels that they read.
        hidden_K: d of the neurons.
    """
    scores_K: Tensor = hidden_K * torch.linalg.vector_norm(down_CK, dim=0, dtype=torch.float64)
    for weight_KC in rows:
        scores_K = scores_K + torch.linalg.vector_norm(weight_KC.double() * read_C, dim=1)
    return scores_K


def kept_neurons(scores_K: Tensor, width: int) -> Tensor:
    """Return ascending int64 indices of the ``width`` neurons that stay: the hundredth that scores lowest, and those
    that score highest; the neurons just above that hundredth go.
    """
    order_K = scores_K.sort(stable=True).indices
    lowest, gone = min(int(LOWEST_KEPT * len(order_K)), width), len(order_K) - width
    kept_K: Tensor = torch.cat([order_K[:lowest], order_K[lowest + gone :]]).sort().values
    return kept_K.cpu()
