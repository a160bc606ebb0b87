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

# Called in a backward with a linear layer's inputs [windows, tokens, in] and the gradients at its outputs [windows,
# tokens, out].
SeeLinear = Callable[[Tensor, Tensor], None]
# Called in a backward with a linear layer's weight [out, in].
SeeWeight = Callable[[Tensor], None]


@dataclass(frozen=True)
class SeenLinear:
    """A linear layer, and what is shown its inputs and output gradients.

    Attributes:
        see_weight: called after ``see``, as soon as the weight is there, which may be sharded until then.
    """

    module: nn.Module
    see: SeeLinear
    see_weight: SeeWeight | None = None


class LinearObserver:
    """Shows some linear layers' inputs and output gradients in the backwards of one loss.

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
        # Prepended, this comes before the hooks that shard weights, in whose backwards they gather what they gave back.
        handles = [
            it.module.register_forward_hook(partial(self._before_weight_goes, it.see_weight), prepend=True)
            for it in self._linears
            if it.see_weight is not None
        ]
        return handles + [it.module.register_forward_hook(partial(self._after, it.see)) for it in self._linears]

    def _is_observed(self) -> bool:
        """Whether the model that runs is the one whose loss it is."""
        return torch.is_grad_enabled() and (self._phase.student is not None) == (self._loss.of == "student")

    def _before_weight_goes(
        self, see: SeeWeight, module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """After a linear layer has run, before its weight may be given back."""
        if not self._is_observed():
            return None
        in_graph = _in_graph(output)
        in_graph.register_hook(lambda _gradients: self._show_weight(see, module))
        return in_graph

    def _show_weight(self, see: SeeWeight, module: nn.Module) -> None:
        if self._phase.backward_of is self._loss:
            see(module.weight.detach())  # type: ignore[operator]

    def _after(self, see: SeeLinear, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """After a linear layer has run."""
        if not self._is_observed():
            return None
        shown: Any = _WithInputs.apply(_in_graph(output), inputs[0].detach())  # type: ignore[no-untyped-call]
        if self._phase.backward_of is None:  # else a checkpointed layer runs again
            shown.grad_fn.observer = partial(self._show, see)
        seen: Tensor = shown
        return seen

    def _show(self, see: SeeLinear, inputs: Tensor, gradients: Tensor) -> None:
        if self._phase.backward_of is self._loss:
            see(*(self._by_window(it) for it in (inputs, gradients)))

    def _by_window(self, it: Tensor) -> Tensor:
        """[windows, tokens, channels], also where a layer reads the tokens of all windows as one."""
        return it if it.ndim > 2 else it.unflatten(0, (self._phase.windows, -1))


def _in_graph(output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


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
