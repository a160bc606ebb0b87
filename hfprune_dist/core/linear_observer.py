"""Observation of the inputs and output gradients of linear layers, of which their weights' gradients are made.

The gradient of W in y = W x + b is the sum over tokens of g x^T, g = dL/dy. So a backward only has to show x and g,
layer by layer, and a weight that is sharded or frozen needs no gradient of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.utils.hooks import RemovableHandle

from hfprune_dist.core.criterion import Loss


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
    """A linear layer to be observed in backward passes. If there is no gradient graph yet, it begins at its output.

    Attributes:
        see: called with its inputs [windows, tokens, in] and the gradients at its outputs [windows, tokens, out].
        see_weight: called after ``see`` with its whole weight, as soon as that is gathered, where it is sharded.
    """

    module: nn.Module
    see: Callable[[Tensor, Tensor], None]
    see_weight: Callable[[Tensor], None] | None = None

    def hook(self, loss: Loss, phase: Phase) -> list[RemovableHandle]:
        """Register the hooks for the backwards of one loss, and return their handles."""

        def is_observed() -> bool:
            """Whether the model that is running is the one that this loss belongs to."""
            return torch.is_grad_enabled() and (phase.student is not None) == loss.of_student

        def before_weight_goes(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not is_observed():
                return None
            in_graph = _in_graph(output)
            in_graph.register_hook(show_weight)
            return in_graph

        def show_weight(_gradients: Tensor) -> None:
            if phase.backward_of is loss and self.see_weight is not None:
                self.see_weight(self.module.weight.detach())  # type: ignore[operator]

        def after(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
            if not is_observed():
                return None
            function: Any = _WithInputs  # torch 2.13 has no types for apply, 2.15 does
            shown = function.apply(_in_graph(output), inputs[0].detach())
            if phase.backward_of is None:  # otherwise a checkpointed layer runs again
                shown.grad_fn.observer = show
            seen: Tensor = shown
            return seen

        def show(inputs: Tensor, gradients: Tensor) -> None:
            if phase.backward_of is loss:  # some layers read the tokens of all windows in one row
                both = (inputs, gradients)
                self.see(*(seen if seen.ndim > 2 else seen.unflatten(0, (phase.windows, -1)) for seen in both))

        handles = [self.module.register_forward_hook(after)]
        if self.see_weight is not None:
            # Prepended, so that it runs before the hooks that shard the weights again; in backward, those gather them.
            handles.append(self.module.register_forward_hook(before_weight_goes, prepend=True))
        return handles


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


class OwnedRows(NamedTuple):
    """A weight whose rows the units own, and the two factors of its gradient g^T x: the inputs x and the gradients g.

    A projection that reads the units' channels is treated as one that makes them, by transposing its weight and
    swapping x and g.
    """

    weight_DC: Tensor
    inputs_BTC: Tensor
    gradients_BTD: Tensor


def seen_weights(
    rows: Sequence[tuple[nn.Module, int]], columns: nn.Module, see: Callable[[Sequence[OwnedRows]], None]
) -> list[SeenLinear]:
    """Return what shows all the weights that one layer's units own, with the factors of their gradients.

    Args:
        rows: linear layers that the channels are made of, whose rows the units own, with the number of parts of each.
        columns: the projection that reads the channels, whose columns the units own.
        see: called once a backward has shown all of them, those of ``rows`` first.
    """
    linears = [*rows, (columns, 0)]
    shown: dict[int, tuple[Tensor, Tensor]] = {}
    owned: dict[int, list[OwnedRows]] = {}

    def see_one(number: int, inputs_BTI: Tensor, gradients_BTO: Tensor) -> None:
        shown[number] = inputs_BTI, gradients_BTO

    def see_weight(number: int, parts: int, weight_OI: Tensor) -> None:
        inputs_BTI, gradients_BTO = shown.pop(number)
        if parts:
            pairs = zip(weight_OI.chunk(parts), gradients_BTO.chunk(parts, dim=-1), strict=True)
            owned[number] = [OwnedRows(weight, inputs_BTI, gradients) for weight, gradients in pairs]
        else:
            owned[number] = [OwnedRows(weight_OI.T, gradients_BTO, inputs_BTI)]
        if len(owned) == len(linears):
            see([rows for place in range(len(linears)) for rows in owned.pop(place)])

    return [
        SeenLinear(linear, partial(see_one, number), partial(see_weight, number, parts))
        for number, (linear, parts) in enumerate(linears)
    ]
