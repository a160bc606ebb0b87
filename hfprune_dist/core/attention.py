"""Causal attention whose backward is a few large matrix products for each group of heads, for CPUs.

Forward is torch's. Its backward on a CPU multiplies small tiles and takes several times as long as forward, most of all
in bfloat16; ours takes a block of queries of all heads that share keys, and all keys that it sees, at once. Softmax is
computed again from queries and keys, so that neither probabilities, nor their normalisers, nor the output are kept.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import scaled_dot_product_attention

# Tokens of a block. A product with fewer rows is slower; more of them waste work on keys that come after a query.
QUERIES = 128


class CausalAttention(Function):
    """softmax(scale * q k^T, over keys not after the query) v, for heads in groups that share keys and values.

    Keeps q, k and v for backward.
    """

    @staticmethod
    def forward(ctx: Any, q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q_BHTS, k_BKTS, v_BKTS)
        ctx.scale = scale
        return scaled_dot_product_attention(q_BHTS, k_BKTS, v_BKTS, is_causal=True, scale=scale, enable_gqa=True)

    @staticmethod
    def backward(ctx: Any, gradient_BHTS: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q_BHTS, k_BKTS, v_BKTS = ctx.saved_tensors
        groups = k_BKTS.shape[1]
        q_BKRS, gradient_BKRS = _grouped(q_BHTS * ctx.scale, groups), _grouped(gradient_BHTS, groups)
        q_gradient_BKRS, k_gradient_BKTS, v_gradient_BKTS = map(torch.empty_like, (q_BKRS, k_BKTS, v_BKTS))
        for one in itertools.product(range(len(q_BHTS)), range(groups)):
            inputs = q_BKRS[one], k_BKTS[one].contiguous(), v_BKTS[one].contiguous(), gradient_BKRS[one]
            k_gradient_BKTS[one], v_gradient_BKTS[one] = _group_gradients(*inputs, q_gradient_BKRS[one])
        return _ungrouped(q_gradient_BKRS.mul_(ctx.scale), q_BHTS.shape), k_gradient_BKTS, v_gradient_BKTS, None


def causal_attention(q_BHTS: Tensor, k_BKTS: Tensor, v_BKTS: Tensor, scale: float) -> Tensor:
    """``CausalAttention`` as a function.

    Args:
        q_BHTS: [windows, heads, tokens, head_size], any floating dtype.
        k_BKTS: [windows, groups, tokens, head_size]; consecutive heads / groups heads share each.
        v_BKTS: as k.

    Returns:
        [windows, heads, tokens, head_size].
    """
    output_BHTS: Tensor = CausalAttention.apply(q_BHTS, k_BKTS, v_BKTS, scale)  # type: ignore[no-untyped-call]
    return output_BHTS


def _group_gradients(
    q_RS: Tensor, k_TS: Tensor, v_TS: Tensor, gradient_RS: Tensor, q_gradient_RS: Tensor
) -> tuple[Tensor, Tensor]:
    """Fill dL/dq of the heads of one group, R rows of (token, head); return dL/dk and dL/dv, in float32 or wider.

    With P = softmax(S): dV = P^T dO, dP = dO V^T, dS = P (dP - P . dP), dQ = dS K, dK = dS^T Q.
    """
    tokens, heads = len(k_TS), len(q_RS) // len(k_TS)
    wide = torch.promote_types(k_TS.dtype, torch.float32)
    k_gradient_TS, v_gradient_TS = (torch.zeros_like(k_TS, dtype=wide) for _ in range(2))
    for start in range(0, tokens, QUERIES):
        stop = min(start + QUERIES, tokens)
        rows, seen = slice(start * heads, stop * heads), slice(stop)
        p_RT = _mask_future(q_RS[rows] @ k_TS[seen].T, start, stop).softmax(dim=-1)
        p_gradient_RT = gradient_RS[rows] @ v_TS[seen].T
        scores_gradient_RT = torch.ops.aten._softmax_backward_data(p_gradient_RT, p_RT, -1, p_RT.dtype)
        v_gradient_TS[seen] += p_RT.T @ gradient_RS[rows]
        k_gradient_TS[seen] += scores_gradient_RT.T @ q_RS[rows]
        torch.matmul(scores_gradient_RT, k_TS[seen], out=q_gradient_RS[rows])
    return k_gradient_TS, v_gradient_TS


def _mask_future(scores_RT: Tensor, start: int, stop: int) -> Tensor:
    """Make the scores of keys after their query -inf, in place; queries are the tokens from ``start`` to ``stop``."""
    own_QHQ = scores_RT.view(stop - start, -1, stop)[:, :, start:]
    future_QQ = torch.full_like(own_QHQ[:, 0], float("-inf")).triu_(diagonal=1)
    own_QHQ.add_(future_QQ[:, None])  # masked_fill_ is ten times as slow on rows this short
    return scores_RT


def _grouped(x_BHTS: Tensor, groups: int) -> Tensor:
    """Heads that share keys side by side, contiguous [windows, groups, rows of (token, head), head_size]."""
    windows, _, tokens, size = x_BHTS.shape
    return x_BHTS.view(windows, groups, -1, tokens, size).transpose(2, 3).reshape(windows, groups, -1, size)


def _ungrouped(x_BKRS: Tensor, shape: torch.Size) -> Tensor:
    """The inverse of ``_grouped``, laid out in memory as projections are: token by token."""
    windows, heads, tokens, size = shape
    x_BTKGS = x_BKRS.view(windows, x_BKRS.shape[1], tokens, -1, size).transpose(1, 2)
    return x_BTKGS.reshape(windows, tokens, heads, size).transpose(1, 2)
