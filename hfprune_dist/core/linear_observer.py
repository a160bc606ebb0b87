"""What gradients of linear layers' weights are made of, shown by a backward in which no parameter has a gradient.

The gradient of W in y = W x + b is the sum over tokens of g x^T, g = dL/dy. So it is enough to see x and g, one layer
after another, and a weight that is sharded or frozen has no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.hooks import RemovableHandle

from hfprune_dist.core.criteria import Loss
from hfprune_dist.core.unit_sums import Phase

# Called in a backward with a linear layer's inputs [tokens, in] and the gradients at its outputs [tokens, out].
SeeLinear = Callable[[Tensor, Tensor], None]


@dataclass(frozen=True)
class SeenLinear:
    """A linear layer, and what is shown its inputs and output gradients."""

    module: nn.Module
    see: SeeLinear


class LinearObserver:
    """Shows some linear layers' inputs and output gradients in the backwards of one loss of the dense model.

    Where there is no graph yet, it begins at a layer's output.

    Args:
        phase: changes as the model runs.
    """

    def __init__(self, linears: Sequence[SeenLinear], loss: Loss, phase: Phase) -> None:
        self._linears = linears
        self._loss = loss
        self._phase = phase

    def hook(self) -> list[RemovableHandle]:
        """Begin to see."""
        return [it.module.register_forward_hook(partial(self._after, it.see)) for it in self._linears]

    def _after(self, see: SeeLinear, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """After a linear layer has run."""
        if not torch.is_grad_enabled() or self._phase.student is not None:
            return None
        in_graph = output if output.requires_grad else output.detach().requires_grad_()
        shown: Any = _WithInputs.apply(in_graph, inputs[0].detach())  # type: ignore[no-untyped-call]
        if self._phase.backward_of is None:  # else a checkpointed layer runs again
            shown.grad_fn.observer = partial(self._show, see)
        seen: Tensor = shown
        return seen

    def _show(self, see: SeeLinear, inputs: Tensor, gradients: Tensor) -> None:
        if self._phase.backward_of is self._loss:
            see(inputs.flatten(0, -2), gradients.flatten(0, -2))


class _WithInputs(Function):
    """A linear layer's output as it is. Keeps the input for backward, where an observer sees both."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, inputs: Tensor) -> Tensor:
        ctx.save_for_backward(inputs)
        ctx.observer = None
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradients: Tensor) -> tuple[Tensor, None]:
        (inputs,) = ctx.saved_tensors
        if ctx.observer is not None:
            ctx.observer(inputs, gradients)
        return gradients, None
