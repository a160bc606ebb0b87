"""Divergence from the dense model as a training loss that never holds the logits of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.autograd import Function

from hfprune_dist.core.head import NOTHING, AfterHead, Rows, head_gradients
from hfprune_dist.core.losses import distillation_gradient
from hfprune_dist.core.portions import wide_dtype


class Divergence(Function):
    """Sum over tokens of KL(dense || model), both with the same head, whose weights get no gradient.

    Forward already computes the gradient at the hidden states, in closed form. So backward needs only one tensor of
    their size, and the logits of only one chunk exist at a time (see ``core.head``).
    """

    @staticmethod
    def forward(ctx: Any, hidden_NC: Tensor, gradients: Callable[[Tensor], list[tuple[Tensor, Tensor]]]) -> Tensor:
        ((loss_N, gradient_NC),) = gradients(hidden_NC)
        ctx.save_for_backward(gradient_NC)
        return loss_N.sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (gradient_NC,) = ctx.saved_tensors
        return gradient_NC * gradient.to(gradient_NC.dtype), None


def summed_divergence(
    hidden_NC: Tensor, dense_NC: Tensor, weight_VC: Tensor, bias_V: Tensor | None, after: AfterHead = NOTHING
) -> Tensor:
    """Return the sum over tokens of KL(dense || model) in nats, a float32 scalar (float64 if the model is float64).

    Args:
        hidden_NC: the model's final hidden states [tokens, hidden_size]; there may be no tokens.
        dense_NC: the dense model's final hidden states for the same tokens, same dtype.
        weight_VC: the head's weight [vocabulary, hidden_size], same dtype.
        bias_V: the head's bias, if it has one.
        after: transformation of the head's logits.
    """
    if not len(hidden_NC):
        return hidden_NC.sum(dtype=wide_dtype(hidden_NC.dtype))
    gradients = partial(
        head_gradients,
        weight_VC=weight_VC,
        bias_V=bias_V,
        logit_gradients=[_loss_of_rows],
        teacher_NC=dense_NC,
        after=after,
    )
    divergence: Tensor = Divergence.apply(hidden_NC, gradients)  # type: ignore[no-untyped-call]
    return divergence


def _loss_of_rows(rows: Rows) -> tuple[Tensor, Tensor]:
    assert rows.teacher_NV is not None
    return distillation_gradient(rows.logits_NV, rows.teacher_NV)
