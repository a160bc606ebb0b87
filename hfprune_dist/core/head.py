"""The head of a language model, in chunks: from hidden states to a loss and its gradient, never over all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

# Logits -> (loss per token [N], gradient of that loss at the logits [N, V]); may overwrite its argument.
LogitGradient = Callable[[Tensor], tuple[Tensor, Tensor]]

CHUNK_BYTES = 64 * 2**20


def head_gradient(
    hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, logit_gradient: LogitGradient
) -> tuple[Tensor, Tensor]:
    """Per-token loss and its gradient at the hidden states: dL/dhidden = dL/dz @ W.

    Args:
        hidden_NC: final hidden states [tokens, hidden_size], float32 or bfloat16, no graph needed.
        weight_VC: the head's weight [vocabulary, hidden_size], same dtype.
        bias_V: the head's bias, if it has one.
        logit_gradient: the loss, as a closed form on float32 logits (float64 where the model is).

    Returns:
        loss_N in float32 (or float64) and the gradient of ``loss_N.sum()`` at ``hidden_NC``, in its dtype.
    """
    losses, gradient_NC = [], torch.empty_like(hidden_NC)
    for rows, logits_NV in logit_chunks(hidden_NC, weight_VC, bias_V):
        loss_N, gradient_NV = logit_gradient(logits_NV)
        losses.append(loss_N)
        torch.matmul(gradient_NV.to(weight_VC.dtype), weight_VC, out=gradient_NC[rows])
    return torch.cat(losses), gradient_NC


def logit_chunks(hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, logits of those rows) in float32 or wider, at most ``CHUNK_BYTES`` of logits at a time."""
    wide = torch.promote_types(hidden_NC.dtype, torch.float32)
    chunk = max(1, CHUNK_BYTES // (weight_VC.shape[0] * wide.itemsize))
    for start in range(0, hidden_NC.shape[0], chunk):
        rows = slice(start, start + chunk)
        yield rows, torch.nn.functional.linear(hidden_NC[rows], weight_VC, bias_V).to(wide)
