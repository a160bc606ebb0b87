"""Observation of a model's units, reduced to sums inside hooks, so that no activation or gradient outlives its layer.

A unit is one or more consecutive channels of h, the input of a layer's output projection (``hfprune_dist.structures``).
Criteria say what is observed there and how it is reduced (``core.criterion``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.hooks import RemovableHandle

from hfprune_dist.core.criterion import Criterion, Loss
from hfprune_dist.core.linear_observer import LinearObserver, Phase, WeightsObserver
from hfprune_dist.core.memory_efficient import can_be_observed, observe_gradient, observed
from hfprune_dist.core.portions import row_blocks, widened


class NonFiniteError(ValueError):
    """A layer's activations or gradients are NaN or infinite; the message says which."""


# Called in the backward of the criterion that ``needs_moments``, from the last layer to the first, with the layer's
# number and the gradients at its output projection's output [tokens, hidden_size].
SeeOutputGradients = Callable[[int, Tensor], None]


@dataclass(frozen=True)
class UnitOutputs:
    """The modules at which a model's units of one kind are observed.

    In mixtures of experts, a layer's output projection is called for one expert at a time, with the activations of the
    tokens that the expert sees [tokens, channels of an expert], the expert's number, and the weights that its outputs
    are multiplied by [tokens]; a layer's units are those of its first expert, then those of its second, and so on. An
    expert without tokens adds nothing.

    Attributes:
        projections: the output projection of each layer, in order; None for layers without such units.
        channels_per_unit: number of consecutive channels that belong to one unit.
        rows: for each layer, the linear layers from whose outputs the channels are made, each with the number of equal
            parts of its rows in which every unit owns some; needed only by criteria that observe "weights".
        experts: number of experts in each layer that has such units; None if the units don't belong to experts.
    """

    projections: Sequence[nn.Module | None]
    channels_per_unit: int
    rows: Sequence[Sequence[tuple[nn.Module, int]]] = ()
    experts: int | None = None

    def units(self, layer: int) -> int:
        """Return the number of units in a layer."""
        projection = self.projections[layer]
        channels = 0 if projection is None else int(projection.in_features)  # type: ignore[arg-type]
        return channels * (self.experts or 1) // self.channels_per_unit


class KindObserver:
    """Adds up what hooks observe at the output projections of one kind of units.

    If gradients are needed and there is no gradient graph yet, it begins at the ``h`` of the first layer.

    Args:
        kind: name of the kind in ``Phase.student``.
        criteria: the criteria, of which those count that have sums of these units.
        phase: the current state of the pass, updated as the model runs.
        see_output_gradients: None if no criterion needs moments, or if they aren't wanted here.

    Attributes:
        sums: criterion -> sums over all micro-batches so far, float64 on the CPU [num_layers, sums of units], unit by
            unit (``Criterion.sums_of_unit``). Layers with fewer units than others are padded with zeros.
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
        self._modules = {layer: module for layer, module in enumerate(outputs.projections) if module is not None}
        self._criteria = [criterion for criterion in criteria if criterion.has_sums_of(kind)]
        self._phase = phase
        self._see_output_gradients = see_output_gradients
        self.forget()
        layers = len(outputs.projections)
        units = max(outputs.units(layer) for layer in range(layers))
        sizes = {it.name: units * it.sums_of_unit(outputs.channels_per_unit) for it in self._criteria}
        self.sums = {name: torch.zeros(layers, size, dtype=torch.float64) for name, size in sizes.items()}

    def hook(self) -> list[RemovableHandle]:
        """Register the hooks and return their handles."""
        handles = []
        for layer, module in self._modules.items():
            handles.append(module.register_forward_pre_hook(partial(self._before, layer), prepend=True))
            handles.append(module.register_forward_hook(partial(self._after, layer)))
        return handles

    def linear_observers(self) -> list[LinearObserver]:
        """Return observers of the weights that units own, one for each criterion that observes these."""
        observers = []
        for criterion in self._criteria:
            if criterion.observes == "weights" and criterion.loss is not None:
                of_layers = [
                    WeightsObserver(self._outputs.rows[layer], module, partial(self._reduce, criterion, layer, 0))
                    for layer, module in self._modules.items()
                ]
                linears = [linear for of_layer in of_layers for linear in of_layer.seen_linears()]
                observers.append(LinearObserver(linears, criterion.loss, self._phase))
        return observers

    def take(self) -> dict[str, Tensor]:
        """Return a micro-batch's sums: criterion -> float32 or wider on the CPU, shaped like ``sums``.

        Raises:
            NonFiniteError: if a layer saw NaN or infinity.
        """
        sums = {it.name: pad_sequence(self._of_layers(it), batch_first=True).cpu() for it in self._criteria}
        if not all(it.isfinite().all() for it in (sums or self._activation_sums).values()):
            self._explain(sums)
        return sums

    def forget(self) -> None:
        """Discard what was observed of a micro-batch: sums so far, float32 or wider, on the model's device."""
        self._seen: dict[tuple[str, int], Tensor] = {}
        self._activation_sums: dict[int, Tensor] = {}

    def _of_layers(self, criterion: Criterion) -> list[Tensor]:
        """Return the sums of every layer; empty for layers without such units."""
        nothing = self._seen[criterion.name, min(self._modules)].new_empty(0)
        layers = range(len(self._outputs.projections))
        return [self._seen[criterion.name, it] if it in self._modules else nothing for it in layers]

    def _before(self, layer: int, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Hook that runs before an output projection, or before that of one expert."""
        hidden_BTD, *of_expert = inputs
        expert = of_expert[0] if of_expert else 0
        is_first_run = self._phase.backward_of is None  # otherwise a checkpointed layer runs again
        if is_first_run and self._phase.student is None:
            hidden_ND = hidden_BTD.detach().flatten(0, -2)
            self._activation_sums[layer] = hidden_ND.sum() + self._activation_sums.get(layer, 0.0)
            for criterion in self._criteria:
                if criterion.observes == "inputs":
                    for rows in row_blocks(hidden_ND, scratch_bytes=16):
                        self._reduce(criterion, layer, expert, widened(hidden_ND[rows]))
        if torch.is_grad_enabled():
            hidden_BTD = self._in_graph(layer, expert, hidden_BTD)
            if is_first_run:
                observe_gradient(hidden_BTD, partial(self._see_effects, layer, expert))
        return (hidden_BTD, *of_expert)

    def _after(self, layer: int, _module: nn.Module, inputs: tuple[Any, ...], output_BTC: Tensor) -> None:
        """Hook that runs after an output projection, or after an expert's."""
        for criterion in self._criteria:
            if criterion.observes == "expert_outputs" and self._phase.backward_of is None and not self._phase.student:
                _, expert, weights_N = inputs
                self._reduce(criterion, layer, expert, widened(output_BTC.detach()), weights_N.detach())
            if criterion.needs_moments and self._see_output_gradients and output_BTC.requires_grad:
                output_BTC.register_hook(partial(self._show_output_gradients, layer, criterion.loss))

    def _show_output_gradients(self, layer: int, loss: Loss | None, gradient_BTC: Tensor) -> None:
        if self._phase.backward_of is loss and self._see_output_gradients is not None:
            self._see_output_gradients(layer, gradient_BTC.flatten(0, -2))

    def _in_graph(self, layer: int, expert: int, hidden_BTD: Tensor) -> Tensor:
        """Return h in a form whose gradient can be observed, masked if the student lacks some of these units.

        In the first layer, h is kept even if a gated product could recompute it: the graph begins with h if no other
        units are scored, and scores must have the same bits if others are.
        """
        if not hidden_BTD.requires_grad:
            hidden_BTD = hidden_BTD.detach().requires_grad_()
        if self._phase.student is not None and self._kind in self._phase.student:
            own = _own(expert, hidden_BTD.shape[-1] // self._outputs.channels_per_unit)
            keeps_U = self._phase.student[self._kind][layer][own]
            return observed(hidden_BTD, keeps_U.repeat_interleave(self._outputs.channels_per_unit))
        is_first = layer == min(self._modules)
        return hidden_BTD if not is_first and can_be_observed(hidden_BTD) else observed(hidden_BTD)

    def _see_effects(self, layer: int, expert: int, product_ND: Tensor) -> None:
        """Observe some tokens' h * dL/dh."""
        assert self._phase.backward_of is not None, "a backward that is not ours"
        channels = self._outputs.channels_per_unit
        effects_NU = product_ND if channels == 1 else product_ND.unflatten(-1, (-1, channels)).sum(dim=-1)
        for criterion in self._criteria:
            if criterion.observes == "effects" and criterion.loss is self._phase.backward_of:
                self._reduce(criterion, layer, expert, effects_NU)

    def _reduce(self, criterion: Criterion, layer: int, expert: int, *seen: Any) -> None:
        """Reduce what a criterion observes, and add it to the sums of a layer, or of one of its experts."""
        assert criterion.reduce is not None
        sum_N, sums, key = criterion.reduce(*seen), self._seen, (criterion.name, layer)
        if key not in sums:
            sums[key] = sum_N.new_zeros(len(sum_N) * (self._outputs.experts or 1))
        sums[key][_own(expert, len(sum_N))] += sum_N

    def _explain(self, sums: Mapping[str, Tensor]) -> None:
        """Raise the error for sums that aren't all finite; it names the layer in which that began."""
        activations = [layer for layer in self._modules if not self._activation_sums[layer].isfinite()]
        if activations:
            raise NonFiniteError(f"activations of layer {activations[0]} are NaN or infinite")
        criterion = next(it for it in self._criteria if not sums[it.name].isfinite().all())
        layers = (~sums[criterion.name].isfinite()).any(dim=1).nonzero().flatten().tolist()
        if criterion.loss is None:
            raise NonFiniteError(f"squared activations of layer {layers[0]} are NaN or infinite")
        raise NonFiniteError(f"gradients of layer {layers[-1]} are NaN or infinite")  # a backward begins at the end


def _own(expert: int, count: int) -> slice:
    """Return the slice of an expert's own entries in a layer's sums, which follow those of earlier experts."""
    return slice(expert * count, (expert + 1) * count)
