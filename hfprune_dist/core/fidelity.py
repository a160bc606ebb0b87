"""How far a model is from its dense original, token by token."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.head import logit_chunks


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
    tokens: int = 0
    predicted: int = 0

    def __add__(self, other: FidelitySums) -> FidelitySums:
        return FidelitySums(
            self.kl + other.kl,
            self.agree + other.agree,
            self.nll + other.nll,
            self.tokens + other.tokens,
            self.predicted + other.predicted,
        )

    def means(self) -> dict[str, float]:
        """Perplexity, mean KL in nats per token and top-1 agreement; values that overflow are infinite."""
        return {
            "perplexity": torch.tensor(self.nll / self.predicted, dtype=torch.float64).exp().item(),
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agree / self.tokens,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class Outputs:
    """A model's outputs for a sequence of tokens, before its head.

    Attributes:
        hidden_NC: final hidden states [tokens, hidden_size].
        weight_VC: the head's weight [vocabulary, hidden_size], same dtype and device.
        bias_V: the head's bias, if it has one.
    """

    hidden_NC: Tensor
    weight_VC: Tensor
    bias_V: Tensor | None

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """(rows, logits of those rows), a chunk at a time."""
        return logit_chunks(self.hidden_NC, self.weight_VC, self.bias_V)


@torch.no_grad()
def compare_outputs(dense: Outputs, model: Outputs, next_ids_N: Tensor) -> FidelitySums:
    """Compare two models on the same tokens; the logits of a chunk of them exist at a time.

    Args:
        dense: the dense model's outputs.
        model: the other model's outputs for the same tokens, over the same vocabulary.
        next_ids_N: the text's next tokens, int64; -1 where there is none.
    """
    total = FidelitySums()
    for (rows, dense_NV), (_, model_NV) in zip(dense.logits(), model.logits(), strict=True):
        total += compare_logits(dense_NV, model_NV, next_ids_N[rows])
    return total


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
    # A logit that isn't a number makes all of its row's so; such models agree in nothing, not even with themselves.
    known_N = ~(log_p_NV[:, 0].isnan() | log_q_NV[:, 0].isnan())
    has_next = next_ids_N >= 0
    nll_N = -log_q_NV[has_next].gather(1, next_ids_N[has_next, None])
    return FidelitySums(
        kl=kl_N.sum(dtype=torch.float64).item(),
        agree=((log_p_NV.argmax(dim=-1) == log_q_NV.argmax(dim=-1)) & known_N).sum().item(),
        nll=nll_N.sum(dtype=torch.float64).item(),
        tokens=next_ids_N.numel(),
        predicted=int(has_next.sum()),
    )


def next_ids(input_ids_T: Tensor) -> Tensor:
    """The token that follows each position of a window [T]; -1 at its end."""
    return torch.cat([input_ids_T[1:], input_ids_T.new_tensor([-1])])
