"""The head of a language model, in chunks: from hidden states to a loss and its gradient, never over all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

# Logits of some rows [N, V], and which rows -> (loss per token [N], its gradient at those logits [N, V]); may overwrite
# the logits.
LogitGradient = Callable[[Tensor, slice], tuple[Tensor, Tensor]]

CHUNK_BYTES = 64 * 2**20


def head_gradients(
    hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, logit_gradients: Sequence[LogitGradient]
) -> list[tuple[Tensor, Tensor]]:
    """Per-token losses and their gradients at the hidden states, dL/dhidden = dL/dz @ W, in one pass over the logits.

    Memory does not grow with the number of losses, but for the results: a chunk's logits are computed once, losses
    overwrite a copy of them one after another, and the last one overwrites the logits themselves. Chunks have the same
    rows whatever the losses, so that no loss changes the bits of another.

    Args:
        hidden_NC: final hidden states [tokens, hidden_size], float32 or bfloat16, no graph needed.
        weight_VC: the head's weight [vocabulary, hidden_size], same dtype.
        bias_V: the head's bias, if it has one.
        logit_gradients: the losses, as closed forms on float32 logits (float64 where the model is).

    Returns:
        For each loss: loss_N in float32 (or float64), and the gradient of ``loss_N.sum()`` at ``hidden_NC``, in its
        dtype.
    """
    losses: list[list[Tensor]] = [[] for _ in logit_gradients]
    gradients_NC = [torch.empty_like(hidden_NC) for _ in logit_gradients]
    last = len(logit_gradients) - 1
    for rows, logits_NV in logit_chunks(hidden_NC, weight_VC, bias_V):
        for number, logit_gradient in enumerate(logit_gradients):
            loss_N, gradient_NV = logit_gradient(logits_NV if number == last else logits_NV.clone(), rows)
            losses[number].append(loss_N)
            torch.matmul(gradient_NV.to(weight_VC.dtype), weight_VC, out=gradients_NC[number][rows])
            del gradient_NV
    return [(torch.cat(loss), gradient_NC) for loss, gradient_NC in zip(losses, gradients_NC, strict=True)]


def logit_chunks(hidden_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None) -> Iterator[tuple[slice, Tensor]]:
    """Yield (rows, logits of those rows) in float32 or wider, at most ``CHUNK_BYTES`` of logits at a time."""
    wide = torch.promote_types(hidden_NC.dtype, torch.float32)
    chunk = max(1, CHUNK_BYTES // (weight_VC.shape[0] * wide.itemsize))
    for start in range(0, hidden_NC.shape[0], chunk):
        rows = slice(start, start + chunk)
        yield rows, torch.nn.functional.linear(hidden_NC[rows], weight_VC, bias_V).to(wide)
