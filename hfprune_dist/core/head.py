"""The head of a language model, in chunks of tokens: losses and gradients without ever holding all logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.memory_limits import CHUNK_BYTES
from hfprune_dist.core.portions import row_blocks, wide_dtype, wide_product


@dataclass(frozen=True)
class Batch:
    """A micro-batch of calibration windows, as losses see it.

    Attributes:
        input_ids_BT: int64, on the model's device.
        windows: each window's number among all calibration windows.
        vocabulary: number of logits per token.
        seed: the sweep's seed.
        teacher: weight of the teacher in a student's loss, in [0, 1], and the temperature that divides its logits.
    """

    input_ids_BT: Tensor
    windows: Sequence[int]
    vocabulary: int
    seed: int
    teacher: tuple[float, float] | None = None

    def labels(self) -> Tensor:
        """Return the next token of the text at each token; -1 at each window's last."""
        return torch.cat([next_ids(input_ids_T) for input_ids_T in self.input_ids_BT])


def next_ids(input_ids_T: Tensor) -> Tensor:
    """Return the token that follows each position of a window [T]; -1 for the last one."""
    return torch.nn.functional.pad(input_ids_T[1:], (0, 1), value=-1)


@dataclass(frozen=True)
class Rows:
    """Some tokens of a batch: logits and a teacher's logits, which a loss may overwrite, and their places in it."""

    logits_NV: Tensor
    numbers: slice
    teacher_NV: Tensor | None = None


@dataclass(frozen=True)
class AfterHead:
    """An architecture's transformation of the logits z of its head: scale * z, or cap * tanh(scale * z / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits_NV: Tensor) -> Tensor:
        """Return the transformed logits; may overwrite its argument."""
        if self.scale != 1.0:
            logits_NV = logits_NV.mul_(self.scale)
        return logits_NV if self.cap is None else logits_NV.div_(self.cap).tanh_().mul_(self.cap)

    def slope(self, logits_NV: Tensor) -> Tensor | float:
        """Return the derivative of the transformed logits, which are given, with respect to the head's own."""
        return self.scale if self.cap is None else self.scale * (1 - (logits_NV / self.cap).square())


IDENTITY = AfterHead()


@dataclass(frozen=True)
class Outputs:
    """A model's final hidden states for a sequence of tokens, and its head, of the same dtype."""

    hidden_NC: Tensor
    weight_VC: Tensor
    bias_V: Tensor | None
    after: AfterHead = IDENTITY

    def logits_of(self, rows: slice) -> Tensor:
        """Return the logits of some tokens, in the model's dtype."""
        return self.after(torch.nn.functional.linear(self.hidden_NC[rows], self.weight_VC, self.bias_V))

    def logits(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, logits of those rows), added up and kept in float32 or wider, one chunk at a time: in
        bfloat16, the two largest are equal at 2 % of all tokens.
        """
        wide = wide_dtype(self.hidden_NC.dtype)
        for rows in self.chunks(wide):
            if self.hidden_NC.dtype == wide:
                yield rows, self.logits_of(rows)
                continue
            hidden_CN = self.hidden_NC[rows].T
            logits_NV = hidden_CN.new_empty(hidden_CN.shape[1], len(self.weight_VC), dtype=wide)
            for some in row_blocks(self.weight_VC):
                logits_NV[:, some] = wide_product(hidden_CN, self.weight_VC[some].T)
            yield rows, self.after(logits_NV if self.bias_V is None else logits_NV.add_(self.bias_V))

    def chunks(self, dtype: torch.dtype) -> Iterator[slice]:
        """Yield chunks of rows, as equal as possible, whose logits in ``dtype`` take at most ``CHUNK_BYTES``."""
        tokens = self.hidden_NC.shape[0]
        most = max(1, CHUNK_BYTES // (self.weight_VC.shape[0] * dtype.itemsize))
        chunk = -(-tokens // -(-tokens // most))
        for start in range(0, tokens, chunk):
            yield slice(start, min(start + chunk, tokens))


# Rows -> (loss per token [N], its gradient at those tokens' logits [N, V])
LogitGradient = Callable[[Rows], tuple[Tensor, Tensor]]


def head_gradients(
    model: Outputs,
    logit_gradients: Sequence[LogitGradient],
    teacher: Outputs | None = None,
    at_logits: Callable[[Tensor, slice], None] | None = None,
) -> list[tuple[Tensor, Tensor]]:
    """Return per-token losses and their gradients at the hidden states, dL/dz @ W, from one pass over the logits.

    A chunk's logits are computed once. Each loss processes them in blocks of rows that fit a cache in float32, and
    stores its gradient in the model's dtype; the last loss stores it in place of the logits. So apart from the results,
    memory does not grow with the number of losses. Chunks have the same rows whatever the losses, so no loss changes
    the bits of another.

    Args:
        model: no graph is needed.
        logit_gradients: the losses, as closed forms on float32 logits (float64 if the model is float64).
        teacher: the dense model's for the same tokens, if the losses compare with it.
        at_logits: called with the last loss's gradient at the head's own logits, and which rows these are.

    Returns:
        For each loss: loss_N in float32 (or float64), and the gradient of its sum at ``hidden_NC``, in its dtype.
    """
    losses: list[list[Tensor]] = [[] for _ in logit_gradients]
    gradients_NC = [torch.empty_like(model.hidden_NC) for _ in logit_gradients]
    last = len(logit_gradients) - 1
    for rows in model.chunks(model.hidden_NC.dtype):
        logits_NV = model.logits_of(rows)
        teacher_NV = None if teacher is None else teacher.logits_of(rows)
        for number, logit_gradient in enumerate(logit_gradients):
            gradient_NV = logits_NV if number == last else torch.empty_like(logits_NV)
            losses[number] += _fill_gradient(
                gradient_NV, logits_NV, teacher_NV, logit_gradient, rows.start, after=model.after
            )
            torch.matmul(gradient_NV, model.weight_VC, out=gradients_NC[number][rows])
            if at_logits is not None and number == last:
                at_logits(gradient_NV, rows)
            del gradient_NV
        del logits_NV, teacher_NV  # before the next chunk's are made
    return [(torch.cat(loss), gradient_NC) for loss, gradient_NC in zip(losses, gradients_NC, strict=True)]


def _fill_gradient(
    gradient_NV: Tensor,
    logits_NV: Tensor,
    teacher_NV: Tensor | None,
    logit_gradient: LogitGradient,
    first_row: int,
    *,
    after: AfterHead,
) -> Iterator[Tensor]:
    """Write a loss's gradient at the head's logits, perhaps in place of them; yield each block's loss per token."""
    wide = wide_dtype(logits_NV.dtype)
    for block in row_blocks(logits_NV):
        rows = Rows(
            logits_NV[block].to(wide, copy=True),
            slice(first_row + block.start, first_row + block.stop),
            None if teacher_NV is None else teacher_NV[block].to(wide, copy=True),
        )
        slope = after.slope(rows.logits_NV)  # before they are overwritten
        loss_N, wide_gradient_NV = logit_gradient(rows)
        gradient_NV[block] = wide_gradient_NV if after == IDENTITY else wide_gradient_NV * slope
        yield loss_N
