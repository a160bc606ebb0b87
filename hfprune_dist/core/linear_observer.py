"""Observation of the inputs and output gradients of linear layers, of which their weights' gradients are made.

The gradient of W in y = W x + b is the sum over tokens of g x^T, g = dL/dy. So a backward only has to show x and g,
layer by layer, and a weight that is sharded or frozen needs no gradient of its own.
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
    """A linear layer, and the callbacks that get its inputs, output gradients and weight.

    Attributes:
        see_weight: called after ``see``, as soon as the weight, which may be sharded until then, is available.
    """

    module: nn.Module
    see: SeeLinear
    see_weight: SeeWeight | None = None


class LinearObserver:
    """Passes some linear layers' inputs and output gradients to callbacks, in the backwards of one loss.

    If there is no gradient graph yet, it begins at a layer's output.

    Args:
        phase: the current state of the pass, updated as the model runs.
    """

    def __init__(self, linears: Sequence[SeenLinear], loss: Loss, phase: Phase) -> None:
        self._linears = linears
        self._loss = loss
        self._phase = phase

    def hook(self) -> list[RemovableHandle]:
        """Register the hooks and return their handles."""
        # Prepended, so that it runs before the hooks that shard the weights again; in backward, those gather them.
        handles = [
            it.module.register_forward_hook(partial(self._before_weight_goes, it.see_weight), prepend=True)
            for it in self._linears
            if it.see_weight is not None
        ]
        return handles + [it.module.register_forward_hook(partial(self._after, it.see)) for it in self._linears]

    def _is_observed(self) -> bool:
        """Return whether the model that is running is the one that this loss belongs to."""
        return torch.is_grad_enabled() and (self._phase.student is not None) == (self._loss.of == "student")

    def _before_weight_goes(
        self, see: SeeWeight, module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor | None:
        """Forward hook that runs before the layer's weight may be sharded again."""
        if not self._is_observed():
            return None
        in_graph = _in_graph(output)
        in_graph.register_hook(lambda _gradients: self._show_weight(see, module))
        return in_graph

    def _show_weight(self, see: SeeWeight, module: nn.Module) -> None:
        if self._phase.backward_of is self._loss:
            see(module.weight.detach())  # type: ignore[operator]

    def _after(self, see: SeeLinear, _module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        """Forward hook that makes backward show the layer's inputs and output gradients."""
        if not self._is_observed():
            return None
        shown: Any = _WithInputs.apply(_in_graph(output), inputs[0].detach())  # type: ignore[no-untyped-call]
        if self._phase.backward_of is None:  # otherwise a checkpointed layer runs again
            shown.grad_fn.observer = partial(self._show, see)
        seen: Tensor = shown
        return seen

    def _show(self, see: SeeLinear, inputs: Tensor, gradients: Tensor) -> None:
        if self._phase.backward_of is self._loss:
            see(*(self._by_window(it) for it in (inputs, gradients)))

    def _by_window(self, it: Tensor) -> Tensor:
        """Return it as [windows, tokens, channels], even if the layer reads the tokens of all windows in one row."""
        return it if it.ndim > 2 else it.unflatten(0, (self._phase.windows, -1))


def _in_graph(output: Tensor) -> Tensor:
    return output if output.requires_grad else output.detach().requires_grad_()


class _WithInputs(Function):
    """Identity on a linear layer's output; keeps the input, which backward passes to an observer with the gradient."""

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
