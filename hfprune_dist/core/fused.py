"""Parts of a transformer layer whose own backward costs more than it has to: normalisation and the gated product.

Both compute forward what the layer computes, bit for bit. What autograd would keep of every step is computed again from
the inputs in backward, and frozen weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import silu

from hfprune_dist.core.blocks import row_blocks

# Some tokens' h and the gradient at h, both [tokens, intermediate_size]; called until all tokens have been seen.
Observer = Callable[[Tensor, Tensor], None]


class RmsNorm(Function):
    """x / rms(x) * weight in float32, rounded to x's dtype before the weight, as Hugging Face's models do it.

    Keeps x and one number per token for backward.
    """

    @staticmethod
    def forward(ctx: Any, x_NC: Tensor, weight_C: Tensor, epsilon: float) -> Tensor:
        wide_NC = x_NC.to(torch.float32)
        scale_N1 = torch.rsqrt(wide_NC.pow(2).mean(-1, keepdim=True) + epsilon)
        ctx.save_for_backward(x_NC, weight_C, scale_N1)
        return weight_C * (wide_NC * scale_N1).to(x_NC.dtype)

    @staticmethod
    def backward(ctx: Any, gradient_NC: Tensor) -> tuple[Tensor, None, None]:
        """dL/dx = s (g w - s^2 x mean(g w x)), with s = 1 / rms(x)."""
        x_NC, weight_C, scale_N1 = ctx.saved_tensors
        weighted_NC = gradient_NC.to(torch.float32) * weight_C.to(torch.float32)
        normal_NC = x_NC.to(torch.float32) * scale_N1
        mean_N1 = (weighted_NC * normal_NC).mean(dim=-1, keepdim=True)
        return weighted_NC.addcmul_(normal_NC, mean_N1, value=-1).mul_(scale_N1).to(x_NC.dtype), None, None


class GatedProduct(Function):
    """h = silu(gate) * up. Keeps gate and up; h is made again in backward, where ``observe_gradient`` shows it."""

    @staticmethod
    def forward(ctx: Any, gate_ND: Tensor, up_ND: Tensor) -> Tensor:
        ctx.save_for_backward(gate_ND, up_ND)
        ctx.observer = None
        return silu(gate_ND) * up_ND

    @staticmethod
    def backward(ctx: Any, gradient_ND: Tensor) -> tuple[Tensor, Tensor]:
        shape = gradient_ND.shape
        gate_ND, up_ND, gradient_ND = (tensor.flatten(0, -2) for tensor in (*ctx.saved_tensors, gradient_ND))
        gate_gradient_ND, up_gradient_ND = torch.empty_like(gate_ND), torch.empty_like(up_ND)
        for rows in row_blocks(gate_ND):
            gate, up, gradient = gate_ND[rows], up_ND[rows], gradient_ND[rows]
            gated = silu(gate)
            if ctx.observer is not None:
                ctx.observer(gated * up, gradient)
            torch.ops.aten.silu_backward.grad_input(gradient * up, gate, grad_input=gate_gradient_ND[rows])
            torch.mul(gated, gradient, out=up_gradient_ND[rows])
        return gate_gradient_ND.view(shape), up_gradient_ND.view(shape)


def rms_norm(x_NC: Tensor, weight_C: Tensor, epsilon: float) -> Tensor:
    """``RmsNorm`` as a function."""
    normal_NC: Tensor = RmsNorm.apply(x_NC, weight_C, epsilon)  # type: ignore[no-untyped-call]
    return normal_NC


def gated_product(gate_ND: Tensor, up_ND: Tensor) -> Tensor:
    """``GatedProduct`` as a function."""
    h_ND: Tensor = GatedProduct.apply(gate_ND, up_ND)  # type: ignore[no-untyped-call]
    return h_ND


def observe_gradient(hidden_ND: Tensor, observer: Observer) -> None:
    """Have ``observer`` called in backward with h and its gradient; for that a ``GatedProduct`` need not keep h."""
    made_by: Any = hidden_ND.grad_fn
    if hasattr(made_by, "observer"):
        made_by.observer = observer
    else:
        kept_ND = hidden_ND.detach().flatten(0, -2)
        hidden_ND.register_hook(lambda gradient_ND: _show_blocks(kept_ND, gradient_ND.flatten(0, -2), observer))


def _show_blocks(hidden_ND: Tensor, gradient_ND: Tensor, observer: Observer) -> None:
    for rows in row_blocks(hidden_ND):
        observer(hidden_ND[rows], gradient_ND[rows])
