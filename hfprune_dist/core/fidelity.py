"""How far a model is from its dense original, token by token."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class FidelitySums:
    """Sums over tokens; divide by their counts once, after adding over chunks and ranks.

    Attributes:
        kl: sum over tokens of KL(dense || model), nats.
        agree: tokens whose most likely next token is the same.
        nll: sum over predicted tokens of the model's negative log-likelihood, nats.
        tokens: number of positions (kl, agree).
        predicted: number of positions with a next token (nll).
    """

    kl: float = 0.0
    agree: float = 0.0
    nll: float = 0.0
    tokens: float = 0.0
    predicted: float = 0.0

    def __add__(self, other: FidelitySums) -> FidelitySums:
        return FidelitySums(*(a + b for a, b in zip(self.as_tuple(), other.as_tuple(), strict=True)))

    def as_tuple(self) -> tuple[float, ...]:
        return (self.kl, self.agree, self.nll, self.tokens, self.predicted)


def compare_logits(dense_NV: Tensor, model_NV: Tensor, next_ids_N: Tensor) -> FidelitySums:
    """Compare two models' logits for the same positions.

    Args:
        dense_NV: the dense model's logits, float32 or float64 [tokens, vocabulary].
        model_NV: the other model's logits, same shape.
        next_ids_N: the text's next tokens, int64; -1 where there is none.
    """
    log_p_NV = dense_NV.log_softmax(dim=-1)
    log_q_NV = model_NV.log_softmax(dim=-1)
    kl_N = (log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(dim=-1)
    has_next = next_ids_N >= 0
    nll_N = -log_q_NV[has_next].gather(1, next_ids_N[has_next, None])
    return FidelitySums(
        kl=kl_N.sum(dtype=torch.float64).item(),
        agree=(log_p_NV.argmax(dim=-1) == log_q_NV.argmax(dim=-1)).sum().item(),
        nll=nll_N.sum(dtype=torch.float64).item(),
        tokens=next_ids_N.numel(),
        predicted=int(has_next.sum()),
    )
