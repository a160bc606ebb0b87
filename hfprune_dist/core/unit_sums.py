"""Sums over tokens that score the units of one kind, reduced inside hooks so that no activation gradient outlives its
layer.

A unit is one or more consecutive channels of what a layer's output projection reads (``hfprune_dist.structures``).
``h`` is that input. Of a gradient, what is added up is |x| or x^2, x the sum of h_n * dL/dh_n over the unit's channels
n: the first-order effect of its removal. Of activations, it is |h_n| or h_n^2 of each channel: the root of a sum of
squares is a norm; or h_n and h_n^2, in float64, since their variance is a difference of the two. Of a whole expert it
may be the norm of what it puts out.
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


class NonFiniteError(ValueError):
    """Activations or gradients of a layer are NaN or infinite; the message says which."""


@dataclass(frozen=True)
class Maker:
    """A linear layer that makes units' channels.

    Attributes:
        parts: equal parts of its rows, in each of which units own some: 2 where gate and up are one matrix.
    """

    module: nn.Module
    parts: int = 1


@dataclass(frozen=True)
class UnitOutputs:
    """Where a model's units of one kind are seen.

    Where layers are mixtures of experts, an output projection is called for one expert after another, with the
    activations of the tokens that the expert sees [tokens, channels of an expert], its number, and what its outputs are
    multiplied with [tokens]; a layer's units are those of its first expert, then those of its second, and so on. An
    expert without tokens adds nothing.

    Attributes:
        projections: the output projection of each layer, in order; None where a layer has no such units.
        channels_per_unit: consecutive channels that are one unit's.
        makers: of each layer, the linear layers that make the channels; where units are scored by weights' products.
        are_neurons: whether each of a unit's channels is made by one row of every maker's parts.
        experts: of each layer that has such units; None: they are of no experts.
        are_experts: whether each of them is an expert with all its channels.
    """

    projections: Sequence[nn.Module | None]
    channels_per_unit: int
    makers: Sequence[Sequence[Maker]] = ()
    are_neurons: bool = False
    experts: int | None = None
    are_experts: bool = False

    def have(self, criterion: Criterion) -> bool:
        """Whether these units have a sum by such a criterion."""
        if self.are_experts:
            return criterion.has_sums_of_units and criterion.is_of_whole_experts
        if criterion.is_of_whole_experts_alone or (self.experts is not None and not criterion.is_of_experts):
            return False
        return criterion.has_sums_of_units and (self.are_neurons or not criterion.is_of_neurons)

    def units(self, layer: int) -> int:
        """How many a layer has."""
        projection = self.projections[layer]
        if projection is None:
            return 0
        channels = int(projection.in_features) * (self.experts or 1)  # type: ignore[arg-type]
        return channels // self.channels_per_unit

    def seen_modules(self) -> list[tuple[int, nn.Module]]:
        """Layers that have units, with their output projections."""
        return [(layer, module) for layer, module in enumerate(self.projections) if module is not None]


@dataclass(frozen=True)
class KindSums:
    """What some micro-batches add up to, for the units of one kind; on the CPU.

    Attributes:
        exact: criterion -> float64 [num_layers, sums of units], those of one behind those of another
            (``Criterion.sums_of_unit``); of all whose sum isn't rounded. Layers with fewer units than others
            have zeros behind theirs.
        terms: of criteria whose sum ``is_rounded``, what each micro-batch adds: criterion -> float32, shaped alike.
    """

    exact: dict[str, Tensor]
    terms: list[dict[str, Tensor]]


# Called in a backward with a layer's number and the gradients at its output projection's output [tokens, hidden_size],
# of the criterion that ``needs_moments``; layers come from the last to the first.
SeeOutputGradients = Callable[[int, Tensor], None]


@dataclass
class Phase:
    """What the model is about, for hooks.

    Attributes:
        windows: of the micro-batch.
        backward_of: the loss whose backward is under way; None in a forward.
        student: kind -> which units the student has, bool [units] of each layer; None where the model is the dense one.
    """

    windows: int = 1
    backward_of: Loss | None = None
    student: Mapping[str, Sequence[Tensor]] | None = None


@dataclass
class _Seen:
    """What hooks have seen of one micro-batch, by layer: float32 or wider, on the model's device."""

    sums: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    activation_sum: dict[int, Tensor] = field(default_factory=dict)


class _Place(NamedTuple):
    """A layer, or one of its experts, whose numbers lie behind those of the experts before it."""

    layer: int
    expert: int = 0

    def own(self, count: int) -> slice:
        """Which of a layer's numbers are its own, if so many are."""
        return slice(self.expert * count, (self.expert + 1) * count)


class KindObserver:
    """Adds up what hooks see at the output projections of one kind of units.

    Where gradients are wanted and there is no graph yet, it begins at the ``h`` of the first layer.

    Args:
        kind: what they are called in ``Phase.student``.
        criteria: those of which these units have a sum.
        phase: changes as the model runs.
        see_output_gradients: None where no criterion needs moments, or nobody wants them.
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
        """Begin to see."""
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
        """What a micro-batch adds up to, criterion -> float32 or wider on the CPU, shaped as ``KindSums.exact``.

        Raises:
            NonFiniteError: where a layer saw NaN or infinity.
        """
        sums = {it.name: pad_sequence(self._of_layers(it), batch_first=True).cpu() for it in self._criteria}
        checked = sums or self._seen.activation_sum
        if not all(it.isfinite().all() for it in checked.values()):
            self._explain(sums)
        return sums

    def add(self, seen: Mapping[str, Tensor]) -> None:
        """Add a micro-batch's sums to those of all."""
        for name, sums_LN in self.sums.exact.items():
            sums_LN += seen[name]
        terms = {it.name: seen[it.name] for it in self._criteria if it.is_rounded}
        if terms:
            self.sums.terms.append(terms)

    def see_sum(self, criterion: Criterion, layer: int, sum_U: Tensor) -> None:
        """Take note of a layer's sum of a micro-batch that was made elsewhere, float32 or wider, of each unit."""
        self._seen.sums[criterion.name, layer] = sum_U

    def forget(self) -> None:
        """Let go of what was seen of a micro-batch."""
        self._seen = _Seen()

    def _of_layers(self, criterion: Criterion) -> list[Tensor]:
        """What every layer adds up to."""
        nothing = self._seen.sums[criterion.name, self._first_layer].new_empty(0)
        return [
            nothing if module is None else self._seen.sums[criterion.name, layer]
            for layer, module in enumerate(self._outputs.projections)
        ]

    def _before(self, layer: int, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Before an output projection runs, or that of one expert."""
        hidden_BTD, *of_expert = inputs
        place = _Place(layer, *of_expert[:1])
        is_first_run = self._phase.backward_of is None  # else a checkpointed layer runs again
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
        """After an expert has run."""
        _, expert, weights_N = inputs
        if self._phase.backward_of is None and self._phase.student is None:
            norms_N = torch.linalg.vector_norm(_widened(output_NC.detach()), dim=-1)
            terms_2N = torch.stack([norms_N * weights_N.detach(), torch.ones_like(norms_N)])
            for criterion in self._criteria:
                if criterion.summed == "routed_output":
                    self._add(criterion, _Place(layer, expert), terms_2N.sum(dim=1))

    def _in_graph(self, layer: int, hidden_BTD: Tensor, keeps_U: Tensor | None) -> Tensor:
        """h, of the student where it lacks some of these units, such that its gradient can be observed.

        In the first layer it is kept also where a gated product that made it could make it again: it is what the graph
        begins with where no other units are scored, and its scores have the same bits where others are.
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
                self._add(criterion, place, _sum_over_tokens(criterion, _widened(hidden_BTD).abs()))

    def _reduce_gradient(self, place: _Place, product_ND: Tensor) -> None:
        """Add some tokens' h * dL/dh to the sums of the micro-batch."""
        assert self._phase.backward_of is not None, "a backward that is not ours"
        magnitude_NU = sum_over_channels(product_ND, self._channels_per_unit).abs_()
        for criterion in self._criteria:
            if criterion.summed == "gradient" and criterion.loss is self._phase.backward_of:
                self._add(criterion, place, _sum_over_tokens(criterion, magnitude_NU))

    def _add(self, criterion: Criterion, place: _Place, sum_N: Tensor) -> None:
        """Add what some tokens add up to in a layer, or in one of its experts."""
        name = criterion.name, place.layer
        if self._outputs.experts is not None and name not in self._seen.sums:
            self._seen.sums[name] = sum_N.new_zeros(len(sum_N) * self._outputs.experts)
        if name in self._seen.sums:
            self._seen.sums[name][place.own(len(sum_N))] += sum_N
        else:
            self._seen.sums[name] = sum_N

    def _explain(self, sums: Mapping[str, Tensor]) -> None:
        lost_in = next((layer for layer in self._modules if not self._seen.activation_sum[layer].isfinite()), None)
        if lost_in is not None:
            raise NonFiniteError(f"activations of layer {lost_in} are NaN or infinite")
        what = "gradients" if any(criterion.loss for criterion in self._criteria) else "squared activations"
        lost = max(int((~it.isfinite()).any(dim=1).nonzero().max()) for it in sums.values() if not it.isfinite().all())
        raise NonFiniteError(f"{what} of layer {lost} are NaN or infinite")


def _nothing_yet(outputs: UnitOutputs, criteria: Sequence[Criterion]) -> KindSums:
    layers = len(outputs.projections)
    units = max(outputs.units(layer) for layer in range(layers))
    exact = {
        it.name: torch.zeros(layers, units * it.sums_of_unit(outputs.channels_per_unit)).double()
        for it in criteria
        if not it.is_rounded
    }
    return KindSums(exact, [])


def sum_over_channels(values_D: Tensor, channels_per_unit: int) -> Tensor:
    """Values of channels, in the last dimension, added up for each unit; as they are where each is a unit."""
    if channels_per_unit == 1:
        return values_D
    sums_U: Tensor = values_D.unflatten(-1, (-1, channels_per_unit)).sum(dim=-1)
    return sums_U


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _moments_over_tokens(hidden_BTD: Tensor) -> Tensor:
    """Of each channel the sums of h and of h^2, float64 [2 * channels], one channel behind another."""
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
