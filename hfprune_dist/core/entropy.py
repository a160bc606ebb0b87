"""Entropy of a softmax distribution and its gradient at the logits, in closed form (HFPrune, arXiv 2603.08083)."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_gradient(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Entropy of every row's distribution and its gradient: dH/dz = -p * (log p + H).

    Args:
        logits_NV: float32 or float64 [tokens, vocabulary]. Overwritten: the buffer becomes scratch space.

    Returns:
        H_N in nats [tokens] and dH/dz [tokens, vocabulary], in the dtype of the logits.
    """
    log_p_NV = torch.sub(logits_NV, torch.logsumexp(logits_NV, dim=-1, keepdim=True), out=logits_NV)
    p_NV = log_p_NV.exp()
    entropy_N = -torch.linalg.vecdot(p_NV, log_p_NV)
    gradient_NV = log_p_NV.add_(entropy_N[:, None]).mul_(p_NV).neg_()
    return entropy_N, gradient_NV
