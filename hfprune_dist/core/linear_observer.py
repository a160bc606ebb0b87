"""Observation of the inputs and output gradients of linear layers, of which their weights' gradients are made.

The gradient of W in y = W x + b is the sum over tokens of g x^T, g = dL/dy. So a backward only has to show x and g,
layer by layer, and a weight that is sharded or frozen needs no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.hooks import RemovableHandle

from hfprune_dist.core.criterion import Loss
from hfprune_dist.core.portions import wide_dtype

# Called in a backward with a linear layer's inputs [windows, tokens, in] and the gradients at its outputs [windows,
# tokens, out].
SeeLinear = Callable[[Tensor, Tensor], None]
# Called in a backward with a linear layer's weight [out, in].
SeeWeight = Callable[[Tensor], None]


@dataclass
class Phase:
    """The current state of the calibration pass, which hooks read.

    Attributes:
        windows: number of windows in the micro-batch.
        backward_of: the loss whose backward is running; None during a forward.
        student: kind -> mask of the units that the student has, bool [units] for each layer; None for the dense model.
    """

    windows: int = 1
    backward_of: Loss | None = None
    student: Mapping[str, Sequence[Tensor]] | None = None


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
        return torch.is_grad_enabled() and (self._phase.student is not None) == self._loss.of_student

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

    def _by_window(self, seen: Tensor) -> Tensor:
        """Return [windows, tokens, channels], even if the layer reads the tokens of all windows in one row."""
        return seen if seen.ndim > 2 else seen.unflatten(0, (self._phase.windows, -1))


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


@dataclass(frozen=True)
class OwnedRows:
    """A weight whose rows the units own, and the two factors of its gradient g^T x.

    A projection that reads the units' channels is treated as one that makes them, by transposing its weight and
    swapping x and g.

    Attributes:
        weight_DC: [rows, hidden_size].
        inputs_BTC: x [windows, tokens, hidden_size].
        gradients_BTD: g [windows, tokens, rows].
    """

    weight_DC: Tensor
    inputs_BTC: Tensor
    gradients_BTD: Tensor

    def zeros(self) -> Tensor:
        """Return zeros as the start of sums, float32 or wider [rows]."""
        return self.weight_DC.new_zeros(len(self.weight_DC), dtype=wide_dtype(self.weight_DC.dtype))

    def products(self, window: int, rows: slice) -> Tensor:
        """Return W * dL/dW of some rows in one window, float32 or wider."""
        wide = wide_dtype(self.weight_DC.dtype)
        gradient_DC = self.gradients_BTD[window, :, rows].to(wide).T @ self.inputs_BTC[window].to(wide)
        return gradient_DC.mul_(self.weight_DC[rows])


class WeightsObserver:
    """Collects all the weights that one layer's units own, with the factors of their gradients, during a backward.

    Args:
        rows: linear layers that the channels are made of, whose rows the units own, with the number of parts of each.
        columns: the projection that reads the channels, whose columns the units own.
        see: called once the backward has shown all of them, those of ``rows`` first.
    """

    def __init__(
        self, rows: Sequence[tuple[nn.Module, int]], columns: nn.Module, see: Callable[[Sequence[OwnedRows]], None]
    ) -> None:
        self._linears = [*rows, (columns, 0)]
        self._see_all = see
        self._shown: dict[int, tuple[Tensor, Tensor]] = {}
        self._owned: dict[int, list[OwnedRows]] = {}

    def seen_linears(self) -> list[SeenLinear]:
        """Return the linear layers with the callbacks that must see them."""
        return [
            SeenLinear(linear, partial(self._see, number), partial(self._see_weight, number, parts))
            for number, (linear, parts) in enumerate(self._linears)
        ]

    def _see(self, number: int, inputs_BTI: Tensor, gradients_BTO: Tensor) -> None:
        self._shown[number] = inputs_BTI, gradients_BTO

    def _see_weight(self, number: int, parts: int, weight_OI: Tensor) -> None:
        inputs_BTI, gradients_BTO = self._shown.pop(number)
        if parts:
            pairs = zip(weight_OI.chunk(parts), gradients_BTO.chunk(parts, dim=-1), strict=True)
            self._owned[number] = [OwnedRows(weight, inputs_BTI, gradients) for weight, gradients in pairs]
        else:
            self._owned[number] = [OwnedRows(weight_OI.T, gradients_BTO, inputs_BTI)]
        if len(self._owned) == len(self._linears):
            self._see_all([it for place in range(len(self._linears)) for it in self._owned.pop(place)])
