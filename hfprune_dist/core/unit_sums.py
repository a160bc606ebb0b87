"""Sums over tokens that score the units of one kind, reduced inside hooks so that no activation gradient outlives its
layer.

A unit is one or more consecutive channels of ``h``, the input of a layer's output projection
(``hfprune_dist.structures``). For gradients, the terms are |x| or x^2, with x the sum of h_n * dL/dh_n over the unit's
channels n: the first-order effect of its removal. For activations, they are |h_n| or h_n^2 of each channel, since the
root of a sum of squares is a norm; or h_n and h_n^2, in float64, since the variance is a difference of the two. For
whole experts, they may be the norms of their outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from hfprune_dist.core.blocks import row_blocks
from hfprune_dist.core.criteria import Criterion, Loss
from hfprune_dist.core.memory_efficient import can_be_observed, masked, observe_gradient, observed
from hfprune_dist.core.unit_outputs import UnitOutputs
from hfprune_dist.core.wide import widened


class NonFiniteError(ValueError):
    """A layer's activations or gradients are NaN or infinite; the message says which."""


@dataclass(frozen=True)
class KindSums:
    """Sums over some micro-batches for the units of one kind, on the CPU.

    Attributes:
        exact: criterion -> float64 [num_layers, sums of units], unit by unit (``Criterion.sums_of_unit``). Layers with
            fewer units than others are padded with zeros.
    """

    exact: dict[str, Tensor]


# Called in the backward of the criterion that ``needs_moments``, from the last layer to the first, with the layer's
# number and the gradients at its output projection's output [tokens, hidden_size].
SeeOutputGradients = Callable[[int, Tensor], None]


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


@dataclass
class _Seen:
    """Sums that hooks have made over one micro-batch so far, by layer: float32 or wider, on the model's device."""

    sums: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    activation_sum: dict[int, Tensor] = field(default_factory=dict)


class _Place(NamedTuple):
    """A layer, or one of its experts, whose entries in a layer's sums follow those of earlier experts."""

    layer: int
    expert: int = 0

    def own(self, count: int) -> slice:
        """Return the slice of its own entries in a layer's sums, given their number."""
        return slice(self.expert * count, (self.expert + 1) * count)


class KindObserver:
    """Adds up what hooks observe at the output projections of one kind of units.

    If gradients are needed and there is no gradient graph yet, it begins at the ``h`` of the first layer.

    Args:
        kind: name of the kind in ``Phase.student``.
        criteria: the criteria for which these units have sums.
        phase: the current state of the pass, updated as the model runs.
        see_output_gradients: None if no criterion needs moments, or if they aren't wanted here.
    """

    def __init__(
        self,
        kind: str,
        outputs: UnitOutputs,
        criteria: Sequence[Criterion],
        phase: Phase,
        see_output_gradients: SeeOutputGradients | None = None,
    ) -> None:
        self._kind = kind
        self._outputs = outputs
        self._modules = dict(outputs.seen_modules())
        self._first_layer = min(self._modules)
        self._channels_per_unit = outputs.channels_per_unit
        self._criteria = criteria
        self._phase = phase
        self._moments_loss = next((criterion.loss for criterion in criteria if criterion.needs_moments), None)
        self._see_output_gradients = see_output_gradients
        self._seen = _Seen()
        self.sums = _nothing_yet(outputs, criteria)

    def hook(self) -> list[RemovableHandle]:
        """Register the hooks and return their handles."""
        handles = [
            module.register_forward_pre_hook(partial(self._before, layer), prepend=True)
            for layer, module in self._modules.items()
        ]
        if self._see_output_gradients is not None and self._moments_loss is not None:
            handles += [
                module.register_forward_hook(self._make_output_hook(layer, self._see_output_gradients))
                for layer, module in self._modules.items()
            ]
        if any(criterion.summed == "routed_output" for criterion in self._criteria):
            handles += [module.register_forward_hook(partial(self._after, it)) for it, module in self._modules.items()]
        return handles

    def seen(self) -> dict[str, Tensor]:
        """Return a micro-batch's sums: criterion -> float32 or wider on the CPU, shaped like ``KindSums.exact``.

        Raises:
            NonFiniteError: if a layer saw NaN or infinity.
        """
        sums = {it.name: pad_sequence(self._of_layers(it), batch_first=True).cpu() for it in self._criteria}
        checked = sums or self._seen.activation_sum
        if not all(it.isfinite().all() for it in checked.values()):
            self._explain(sums)
        return sums

    def add(self, seen: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's sums to ``sums``."""
        for name, sums_LN in self.sums.exact.items():
            sums_LN += seen[name]

    def see_sum(self, criterion: Criterion, layer: int, sum_U: Tensor) -> None:
        """Record a layer's sums over a micro-batch that were computed elsewhere, float32 or wider, one per unit."""
        self._seen.sums[criterion.name, layer] = sum_U

    def forget(self) -> None:
        """Discard what was observed of a micro-batch."""
        self._seen = _Seen()

    def _of_layers(self, criterion: Criterion) -> list[Tensor]:
        """Return the sums of every layer; empty for layers without such units."""
        nothing = self._seen.sums[criterion.name, self._first_layer].new_empty(0)
        return [
            nothing if module is None else self._seen.sums[criterion.name, layer]
            for layer, module in enumerate(self._outputs.projections)
        ]

    def _before(self, layer: int, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Hook that runs before an output projection, or before that of one expert."""
        hidden_BTD, *of_expert = inputs
        place = _Place(layer, *of_expert[:1])
        is_first_run = self._phase.backward_of is None  # otherwise a checkpointed layer runs again
        if is_first_run and self._phase.student is None:
            activation_sum = hidden_BTD.detach().sum()
            self._seen.activation_sum[layer] = activation_sum + self._seen.activation_sum.get(layer, 0.0)
            self._reduce_activation(place, hidden_BTD.detach())
        keeps = None if self._phase.student is None else self._phase.student.get(self._kind)
        if torch.is_grad_enabled():
            units = hidden_BTD.shape[-1] // self._channels_per_unit
            hidden_BTD = self._in_graph(layer, hidden_BTD, None if keeps is None else keeps[layer][place.own(units)])
            if is_first_run:
                observe_gradient(hidden_BTD, partial(self._reduce_gradient, place))
        return (hidden_BTD, *of_expert)

    def _after(self, layer: int, _module: nn.Module, inputs: tuple[Any, ...], output_NC: Tensor) -> None:
        """Hook that runs after an expert."""
        _, expert, weights_N = inputs
        if self._phase.backward_of is None and self._phase.student is None:
            norms_N = torch.linalg.vector_norm(widened(output_NC.detach()), dim=-1)
            terms_2N = torch.stack([norms_N * weights_N.detach(), torch.ones_like(norms_N)])
            for criterion in self._criteria:
                if criterion.summed == "routed_output":
                    self._add(criterion, _Place(layer, expert), terms_2N.sum(dim=1))

    def _in_graph(self, layer: int, hidden_BTD: Tensor, keeps_U: Tensor | None) -> Tensor:
        """Return h in a form whose gradient can be observed, masked if the student lacks some of these units.

        In the first layer, h is kept even if a gated product could recompute it: the graph begins with h if no other
        units are scored, and scores must have the same bits if others are.
        """
        if not hidden_BTD.requires_grad:
            hidden_BTD = hidden_BTD.detach().requires_grad_()
        if keeps_U is not None:
            return masked(hidden_BTD, keeps_U.repeat_interleave(self._channels_per_unit))
        return hidden_BTD if layer > self._first_layer and can_be_observed(hidden_BTD) else observed(hidden_BTD)

    def _make_output_hook(
        self, layer: int, see: SeeOutputGradients
    ) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def show(gradient_BTC: Tensor) -> None:
            if self._phase.backward_of is self._moments_loss:
                see(layer, gradient_BTC.flatten(0, -2))

        def after_output_projection(_module: nn.Module, _inputs: tuple[Tensor, ...], output_BTC: Tensor) -> None:
            if output_BTC.requires_grad:
                output_BTC.register_hook(show)

        return after_output_projection

    def _reduce_activation(self, place: _Place, hidden_BTD: Tensor) -> None:
        for criterion in self._criteria:
            if criterion.summed == "moments":
                self._add(criterion, place, _moments_over_tokens(hidden_BTD))
            elif criterion.summed == "activation":
                self._add(criterion, place, _sum_over_tokens(criterion, widened(hidden_BTD).abs()))

    def _reduce_gradient(self, place: _Place, product_ND: Tensor) -> None:
        """Add some tokens' h * dL/dh to the micro-batch's sums."""
        assert self._phase.backward_of is not None, "a backward that is not ours"
        magnitude_NU = sum_over_channels(product_ND, self._channels_per_unit).abs_()
        for criterion in self._criteria:
            if criterion.summed == "gradient" and criterion.loss is self._phase.backward_of:
                self._add(criterion, place, _sum_over_tokens(criterion, magnitude_NU))

    def _add(self, criterion: Criterion, place: _Place, sum_N: Tensor) -> None:
        """Add the sums over some tokens to those of a layer, or of one of its experts."""
        name = criterion.name, place.layer
        if self._outputs.experts is not None and name not in self._seen.sums:
            self._seen.sums[name] = sum_N.new_zeros(len(sum_N) * self._outputs.experts)
        if name in self._seen.sums:
            self._seen.sums[name][place.own(len(sum_N))] += sum_N
        else:
            self._seen.sums[name] = sum_N

    def _explain(self, sums: Mapping[str, Tensor]) -> None:
        """Raise the error for sums that aren't all finite; it names the layer in which that began."""
        lost_in = next((layer for layer in self._modules if not self._seen.activation_sum[layer].isfinite()), None)
        if lost_in is not None:
            raise NonFiniteError(f"activations of layer {lost_in} are NaN or infinite")
        criterion = next(it for it in self._criteria if not sums[it.name].isfinite().all())
        layers = (~sums[criterion.name].isfinite()).any(dim=1).nonzero().flatten().tolist()
        if criterion.loss is None:
            raise NonFiniteError(f"squared activations of layer {layers[0]} are NaN or infinite")
        raise NonFiniteError(f"gradients of layer {layers[-1]} are NaN or infinite")  # a backward begins at the end


def _nothing_yet(outputs: UnitOutputs, criteria: Sequence[Criterion]) -> KindSums:
    layers = len(outputs.projections)
    units = max(outputs.units(layer) for layer in range(layers))
    exact = {
        it.name: torch.zeros(layers, units * it.sums_of_unit(outputs.channels_per_unit)).double() for it in criteria
    }
    return KindSums(exact)


def sum_over_channels(values_D: Tensor, channels_per_unit: int) -> Tensor:
    """Add up the channels in the last dimension for each unit; return them unchanged if each channel is a unit."""
    if channels_per_unit == 1:
        return values_D
    sums_U: Tensor = values_D.unflatten(-1, (-1, channels_per_unit)).sum(dim=-1)
    return sums_U


def _moments_over_tokens(hidden_BTD: Tensor) -> Tensor:
    """Return the sums of h and of h^2 for each channel, float64 [2 * channels], channel by channel."""
    hidden_ND = hidden_BTD.flatten(0, -2)
    moments_D2 = hidden_ND.new_zeros(hidden_ND.shape[1], 2, dtype=torch.float64)
    for rows in row_blocks(hidden_ND, scratch_bytes=16):
        wide_RD = hidden_ND[rows].double()
        moments_D2[:, 0] += wide_RD.sum(dim=0)
        moments_D2[:, 1] += wide_RD.square().sum(dim=0)
    return moments_D2.flatten()


def _sum_over_tokens(criterion: Criterion, magnitude_BTD: Tensor) -> Tensor:
    terms_BTD = magnitude_BTD if criterion.reduction == "abs" else magnitude_BTD.square()
    return terms_BTD.flatten(0, -2).sum(dim=0)
