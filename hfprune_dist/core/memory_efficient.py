"""Norms, gated products and linear layers whose backward takes less memory and work than autograd's.

Their forward has the same bits as that of the layers they replace; for norms on GPUs, ``models`` takes torch's kernel
where there is one. Backward recomputes from the inputs what autograd would keep of every step, and frozen weights get
no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear, silu

from hfprune_dist.core.portions import row_blocks, widened

# Called with some tokens' h * dL/dh in float32 or wider, [tokens, channels], and which tokens these are, until all have
# been shown.
Observer = Callable[[Tensor, slice], None]


class RmsNorm(Function):
    """x / rms(x) * weight, where x / rms(x) is float32 and rounded to x's dtype before the product, as in transformers.

    Keeps x and one number per token for backward.
    """

    @staticmethod
    def forward(ctx: Any, x_BTC: Tensor, weight_C: Tensor, epsilon: float) -> Tensor:
        x_NC = x_BTC.flatten(0, -2)
        normal_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
        scale_N1 = torch.empty(len(x_NC), 1, dtype=torch.float32, device=x_NC.device)
        for rows in row_blocks(x_NC):
            wide = x_NC[rows].to(torch.float32)
            scale_N1[rows] = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + epsilon)
            normal_NC[rows] = wide * scale_N1[rows]
        ctx.save_for_backward(x_NC, weight_C, scale_N1)
        return (weight_C * normal_NC).view(x_BTC.shape)

    @staticmethod
    def backward(ctx: Any, gradient_BTC: Tensor) -> tuple[Tensor, None, None]:
        """dL/dx = s (g w - s^2 x mean(g w x)), with s = 1 / rms(x)."""
        x_NC, weight_C, scale_N1 = ctx.saved_tensors
        gradient_NC, wide_weight_C = gradient_BTC.flatten(0, -2), weight_C.to(torch.float32)
        x_gradient_NC = torch.empty_like(x_NC, memory_format=torch.contiguous_format)
        for rows in row_blocks(x_NC):
            weighted = gradient_NC[rows].to(torch.float32) * wide_weight_C
            normal = x_NC[rows].to(torch.float32) * scale_N1[rows]
            mean = (weighted * normal).mean(dim=-1, keepdim=True)
            x_gradient_NC[rows] = weighted.sub_(normal.mul_(mean)).mul_(scale_N1[rows])
        return x_gradient_NC.view(gradient_BTC.shape), None, None


class FrozenLinear(Function):
    """x W^T + b, where neither W nor b gets a gradient. Keeps W itself, neither a view nor a copy of it.

    So a weight that is sharded over ranks can be released after forward and gathered again for backward; and where a
    checkpointed layer runs again, it can stop before this product, since backward needs nothing that it computes.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_DC: Tensor, bias_D: Tensor | None) -> Tensor:
        ctx.weight_DC = weight_DC
        return linear(x_NC, weight_DC, bias_D)

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, None, None]:
        return gradient_ND.matmul(ctx.weight_DC), None, None


class Routed(Function):
    """Rows of x, each repeated for every expert that reads it, in the order of the experts. Keeps only that order.

    ``order_S`` is a permutation of range(rows * K), int64, in which s stands for row s // K. Sums of several experts'
    gradients at a row have the same bits in any order of the experts.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, order_S: Tensor) -> Tensor:
        ctx.tokens = len(x_NC)
        ctx.save_for_backward(order_S)
        return x_NC.index_select(0, order_S.div(len(order_S) // len(x_NC), rounding_mode="floor"))

    @staticmethod
    def backward(ctx: Any, gradient_SC: Tensor) -> tuple[Tensor, None]:
        (order_S,) = ctx.saved_tensors
        return summed_per_token(gradient_SC, order_S, ctx.tokens), None


class GatedProduct(Function):
    """h = silu(gate) * up. Keeps gate and up, from which backward computes what ``observe_gradient`` shows."""

    @staticmethod
    def forward(ctx: Any, gate_ND: Tensor, up_ND: Tensor) -> Tensor:
        ctx.save_for_backward(gate_ND, up_ND)
        ctx.observer = None
        return silu(gate_ND) * up_ND

    @staticmethod
    def backward(ctx: Any, gradient_BTD: Tensor) -> tuple[Tensor, Tensor]:
        gate_ND, up_ND, gradient_ND = (tensor.flatten(0, -2) for tensor in (*ctx.saved_tensors, gradient_BTD))
        gate_gradient_ND, up_gradient_ND = torch.empty_like(gate_ND), torch.empty_like(up_ND)
        for rows in row_blocks(gate_ND):
            gate, up, gradient = widened(gate_ND[rows]), widened(up_ND[rows]), widened(gradient_ND[rows])
            up_gradient = silu(gate).mul_(gradient)
            up_gradient_ND[rows] = up_gradient
            gate_gradient_ND[rows] = torch.ops.aten.silu_backward(gradient * up, gate)
            if ctx.observer is not None:
                ctx.observer(up_gradient.mul_(up), rows)
        return gate_gradient_ND.view(gradient_BTD.shape), up_gradient_ND.view(gradient_BTD.shape)


class Observed(Function):
    """h unchanged. In backward, observers (``observe_gradient``) see h times the gradient at the result."""

    @staticmethod
    def forward(ctx: Any, h_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(h_BTD)
        ctx.observer = None
        return h_BTD.view_as(h_BTD)

    @staticmethod
    def backward(ctx: Any, gradient_BTD: Tensor) -> Tensor:
        (h_BTD,) = ctx.saved_tensors
        if ctx.observer is not None:
            hidden_ND, gradient_ND = h_BTD.flatten(0, -2), gradient_BTD.flatten(0, -2)
            for rows in row_blocks(hidden_ND):
                ctx.observer(widened(hidden_ND[rows]) * widened(gradient_ND[rows]), rows)
        return gradient_BTD


# The same as functions.
rms_norm: Callable[[Tensor, Tensor, float], Tensor] = RmsNorm.apply
frozen_linear: Callable[[Tensor, Tensor, Tensor | None], Tensor] = FrozenLinear.apply
routed: Callable[[Tensor, Tensor], Tensor] = Routed.apply
gated_product: Callable[[Tensor, Tensor], Tensor] = GatedProduct.apply
observed: Callable[[Tensor], Tensor] = Observed.apply


def summed_per_token(routed_SC: Tensor, order_S: Tensor, tokens: int) -> Tensor:
    """Return for each of ``tokens`` tokens the sum of the rows that were ``routed`` from it."""
    places_S = torch.empty_like(order_S)
    places_S[order_S] = torch.arange(len(order_S), device=order_S.device)
    routed_NKC: Tensor = routed_SC.index_select(0, places_S).unflatten(0, (tokens, -1))
    return routed_NKC.sum(dim=1)


def can_be_observed(h_BTD: Tensor) -> bool:
    """Return whether ``observe_gradient`` accepts h, as it does what a ``GatedProduct`` made."""
    return hasattr(h_BTD.grad_fn, "observer")


def observe_gradient(h_BTD: Tensor, observer: Observer) -> None:
    """Have ``observer`` called in backward with h * dL/dh, which it must not modify; several are all called."""
    made_by: Any = h_BTD.grad_fn
    earlier: Observer | None = made_by.observer

    def observe(product_ND: Tensor, rows: slice) -> None:
        if earlier is not None:
            earlier(product_ND, rows)
        observer(product_ND, rows)

    made_by.observer = observe
