"""Entropy of a softmax distribution and its gradient at the logits, in closed form (HFPrune, arXiv 2603.08083)."""

from __future__ import annotations

import torch
from torch import Tensor


def entropy_gradient(logits_NV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's entropy and its gradient: dH/dz = -p * (log p + H) = p * (sum_v p_v z_v - z).

    Args:
        logits_NV: float32 or float64 [tokens, vocabulary]. Overwritten: the buffer becomes the gradient.

    Returns:
        H_N in nats [tokens] and dH/dz [tokens, vocabulary], in the dtype of the logits.
    """
    shifted_NV = logits_NV.sub_(logits_NV.amax(dim=-1, keepdim=True))
    weight_NV = shifted_NV.exp()
    total_N = weight_NV.sum(dim=-1)
    mean_N = torch.linalg.vecdot(weight_NV, shifted_NV).div_(total_N)
    gradient_NV = shifted_NV.sub_(mean_N[:, None]).mul_(weight_NV).mul_(total_N.reciprocal().neg_()[:, None])
    return total_N.log().sub_(mean_N), gradient_NV
