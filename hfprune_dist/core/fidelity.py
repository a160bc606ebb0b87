"""Divergence of a model from its dense original, token by token."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from hfprune_dist.core.head import Outputs
from hfprune_dist.core.portions import row_blocks


@dataclass(frozen=True)
class FidelitySums:
    """Sums over tokens; divide by their counts only once, after adding over chunks and ranks.

    Attributes:
        kl: sum over tokens of KL(dense || model), nats.
        agree: number of positions at which both models' most likely next token is the same.
        nll: sum over predicted tokens of the model's negative log-likelihood, nats.
        tokens: number of positions (kl, agree).
        predicted: number of positions with a next token (nll).
    """

    kl: float = 0.0
    agree: int = 0
    nll: float = 0.0
    tokens: int = 0
    predicted: int = 0

    def __add__(self, other: FidelitySums) -> FidelitySums:
        return FidelitySums(*map(operator.add, astuple(self), astuple(other)))

    def means(self) -> dict[str, float]:
        """Return perplexity, mean KL in nats per token and top-1 agreement; values that overflow are infinite."""
        return {
            "perplexity": torch.tensor(self.nll / self.predicted, dtype=torch.float64).exp().item(),
            "kl": self.kl / self.tokens,
            "top1_agreement": self.agree / self.tokens,
            "tokens": self.tokens,
        }


def standard_errors(windows: Sequence[FidelitySums]) -> dict[str, float]:
    """Return standard errors of ``FidelitySums.means`` from a text's windows (``kl_stderr``, ...); NaN for one window.

    Tokens within a window depend on each other, windows hardly do. Means over tokens are ratios of sums, so their
    errors are those of ratio estimators, whatever the windows' lengths; that of perplexity uses the delta method.
    """
    total = sum(windows, FidelitySums())
    errors = {
        "perplexity": _error_of_ratio([(one.nll, one.predicted) for one in windows]) * total.means()["perplexity"],
        "kl": _error_of_ratio([(one.kl, one.tokens) for one in windows]),
        "top1_agreement": _error_of_ratio([(one.agree, one.tokens) for one in windows]),
    }
    return {f"{name}_stderr": error for name, error in errors.items()}


def _error_of_ratio(windows: Sequence[tuple[float, int]]) -> float:
    """Return the standard error of a ratio of two sums, linearized (Cochran, Sampling Techniques, section 6.4)."""
    if len(windows) < 2:
        return math.nan
    sums_W, counts_W = torch.tensor(windows, dtype=torch.float64).unbind(dim=1)
    residuals_W = sums_W - sums_W.sum() / counts_W.sum() * counts_W
    variance = residuals_W.square().sum() * len(windows) / (len(windows) - 1)
    return (variance.sqrt() / counts_W.sum()).item()


@torch.no_grad()
def divergences(dense: Outputs, models: Sequence[Outputs]) -> list[float]:
    """Return KL(dense || model) for each of several models, summed over the same tokens, in nats.

    The dense model's logits are computed once. At any time, only one chunk's logits exist, for it and one other model.
    The sums stay on the device until the last chunk, so that no chunk waits for the host.
    """
    sums = [dense.hidden_NC.new_zeros((), dtype=torch.float64) for _ in models]
    chunks = [model.logits() for model in models]
    for _, dense_NV in dense.logits():
        log_p_NV = dense_NV.log_softmax(dim=-1)
        p_NV = log_p_NV.exp()
        impossible_NV = p_NV == 0  # 0 log 0 = 0, also where the other model's logit is -inf as well
        for place, of_model in enumerate(chunks):
            _, model_NV = next(of_model)
            log_q_NV = model_NV.log_softmax(dim=-1)
            del model_NV
            # In place, since making room for as many numbers as there are logits takes longer than computing them.
            ratio_NV = torch.sub(log_p_NV, log_q_NV, out=log_q_NV)
            sums[place] += _summed(ratio_NV.masked_fill_(impossible_NV, 0.0).mul_(p_NV))
    return [float(total) for total in torch.stack(sums).tolist()] if sums else []


@torch.no_grad()
def compare_outputs(dense: Outputs, model: Outputs, next_ids_N: Tensor) -> FidelitySums:
    """Compare two models on the same tokens, one chunk of logits at a time; ``next_ids_N`` as in ``compare_logits``."""
    total = FidelitySums()
    chunks = None if model is dense else model.logits()
    for rows, dense_NV in dense.logits():
        model_NV = dense_NV if chunks is None else next(chunks)[1]
        ids_N = next_ids_N[rows]
        for block in row_blocks(dense_NV):
            total += compare_logits(dense_NV[block], model_NV[block], ids_N[block])
    return total


def compare_logits(dense_NV: Tensor, model_NV: Tensor, next_ids_N: Tensor) -> FidelitySums:
    """Compare two models' logits for the same positions, float32 or float64; ``next_ids_N`` are the tokens that follow
    there, int64, -1 where none does.
    """
    log_p_NV = dense_NV.log_softmax(dim=-1)
    log_q_NV = model_NV.log_softmax(dim=-1)
    # One NaN logit makes its whole row NaN; such a row agrees with nothing, not even with itself.
    known_N = ~(log_p_NV[:, 0].isnan() | log_q_NV[:, 0].isnan())
    has_next = next_ids_N >= 0
    nll_N = -log_q_NV.gather(1, next_ids_N.clamp(min=0)[:, None]).squeeze(1).where(has_next, 0.0)
    agree_N = (log_p_NV.argmax(dim=-1) == log_q_NV.argmax(dim=-1)) & known_N
    p_NV = log_p_NV.exp()
    kl = _summed(p_NV * (log_p_NV - log_q_NV).masked_fill_(p_NV == 0, 0.0))
    sums = [kl, *(each.double().sum() for each in (nll_N, agree_N, has_next))]
    kl, nll, agree, predicted = torch.stack(sums).tolist()  # for a GPU, the host waits once
    return FidelitySums(kl=kl, agree=int(agree), nll=nll, tokens=next_ids_N.numel(), predicted=int(predicted))


def _summed(terms_NV: Tensor) -> Tensor:
    """Return the sum of float32 terms, in float64 over tokens."""
    return terms_NV.sum(dim=-1).sum(dtype=torch.float64)
