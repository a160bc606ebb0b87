"""Observation of a model's units, reduced to sums inside hooks, so that no activation or gradient outlives its layer.

A unit is one or more consecutive channels of h, the input of a layer's output projection (``hfprune_dist.structures``).
Criteria say what is observed there and how it is reduced (``core.criterion``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from hfprune_dist.core.criterion import Criterion, Loss, losses_of
from hfprune_dist.core.linear_observer import OwnedRows, Phase, SeenLinear, seen_weights
from hfprune_dist.core.memory_efficient import can_be_observed, observe_gradient, observed
from hfprune_dist.core.portions import row_blocks, widened

# Kind of units, number of the layer, name of the criterion.
Key = tuple[str, int, str]
# In place of a criterion: the sum of a layer's activations, which shows whether they are finite.
_ACTIVATIONS = "activations"


class NonFiniteError(ValueError):
    """A layer's activations or gradients are NaN or infinite; the message says which."""


# Called with the name of a Gram matrix, the layer's number and vectors to add to it: in the forward, ``gram_name`` of a
# kind of units and what their output projection reads [tokens, channels]; in the backward of the criterion that
# ``needs_moments``, from the last layer to the first, the kind and the gradients at its output [tokens, hidden_size].
SeeVectors = Callable[[str, int, Tensor], None]


def gram_name(kind: str) -> str:
    """The name under which h h^T is added up, h being what the output projection of a kind of units reads."""
    return f"{kind}.inputs"


@dataclass(frozen=True)
class SeenUnits:
    """Where a layer's units of one kind are observed.

    In mixtures of experts, the output projection is called with the activations of the tokens that the first expert
    sees, then those of the second, and so on [tokens, channels of an expert]; the expert of each of them; and the
    weights that its outputs are multiplied by. A layer's units are those of its first expert, then those of its second.

    Attributes:
        projection: the layer's output projection.
        rows: the linear layers from whose outputs the channels are made, each with the number of equal parts of its
            rows in which every unit owns some; needed only by criteria that observe "weights".
        experts: number of experts among which the units are divided.
    """

    kind: str
    layer: int
    projection: nn.Module
    channels_per_unit: int = 1
    rows: Sequence[tuple[nn.Module, int]] = ()
    experts: int = 1


class UnitSums:
    """Sums over tokens for every unit and criterion, accumulated for all kinds of units in the same passes.

    The gradient graph begins at the first ``h`` of any kind, or at the first of ``linears``: nothing below it needs a
    gradient, and no parameter does. Scoring further kinds changes no bits of the others' sums.

    Args:
        units: those of all kinds in all layers that have some, layer by layer.
        see_vectors: is shown what output projections read, and the gradients that moments need.
        linears: linear layers whose weights' gradients are observed, if a criterion needs them.

    Attributes:
        sums: what criteria ``reduce`` to, added up over all micro-batches so far, float64 on the CPU; of experts one
            after another.
    """

    def __init__(
        self,
        units: Sequence[SeenUnits],
        criteria: Sequence[Criterion],
        see_vectors: SeeVectors = lambda *_: None,
        linears: Sequence[SeenLinear] = (),
    ) -> None:
        self.criteria = criteria
        self.sums: dict[Key, Tensor] = {}
        self.phase = Phase()
        self._units = units
        self._first = {seen.kind: seen.layer for seen in reversed(units)}
        self._see_vectors = see_vectors
        losses = losses_of(criterion for criterion in criteria if criterion.observes == "weight_gradients")
        self._linears = [(linear, loss) for loss in losses for linear in linears]
        for seen in units:
            for criterion in self._observing(seen, "weights"):
                weights = seen_weights(seen.rows, seen.projection, partial(self._see_weights, seen, criterion))
                self._linears += [(linear, criterion.loss) for linear in weights if criterion.loss is not None]
        # What was observed of a micro-batch, float32 or wider, on the model's device.
        self._seen: dict[Key, Tensor] = {}

    @contextmanager
    def observe(self) -> Iterator[None]:
        """Hook the modules for one forward and its backwards, then add what they saw to the sums. Raises NonFiniteError
        if a layer saw NaN or infinity; the sums are then unchanged.
        """
        handles: list[RemovableHandle] = []
        for units in self._units:
            handles.append(units.projection.register_forward_pre_hook(partial(self._before, units), prepend=True))
            handles.append(units.projection.register_forward_hook(partial(self._after, units)))
        handles += [handle for linear, loss in self._linears for handle in linear.hook(loss, self.phase)]
        try:
            yield
            for key, sum_N in self._taken().items():
                self.sums[key] = self.sums.get(key, 0.0) + sum_N
        finally:
            self.phase.student = None
            for handle in handles:
                handle.remove()
            self._seen = {}

    def _observing(self, units: SeenUnits, what: str) -> list[Criterion]:
        observing = (criterion for criterion in self.criteria if criterion.observes == what)
        return [criterion for criterion in observing if criterion.has_sums_of(units.kind)]

    def _taken(self) -> dict[Key, Tensor]:
        """Return a micro-batch's sums, float64 on the CPU."""
        flat_N = torch.cat([sum_N.double().view(-1) for sum_N in self._seen.values()]).cpu()
        taken = dict(zip(self._seen, flat_N.split([sum_N.numel() for sum_N in self._seen.values()]), strict=True))
        if not flat_N.isfinite().all():
            lost = [key for key, sum_N in taken.items() if not sum_N.isfinite().all()]
            of_backwards = {criterion.name for criterion in self.criteria if criterion.loss is not None}
            activations = [layer for _, layer, name in lost if name not in of_backwards]
            if activations:
                raise NonFiniteError(f"activations of layer {min(activations)} are NaN or infinite")
            last = max(layer for _, layer, _ in lost)  # a backward begins at the end
            raise NonFiniteError(f"gradients of layer {last} are NaN or infinite")
        return {key: sum_N for key, sum_N in taken.items() if key[2] != _ACTIVATIONS}

    def _before(self, units: SeenUnits, _module: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """Hook that runs before an output projection."""
        hidden_BTD, *of_experts = inputs
        # A checkpointed layer runs again in a backward; of students, only weights are observed.
        is_observed = self.phase.backward_of is None and self.phase.student is None
        if is_observed:
            hidden_ND = hidden_BTD.detach().flatten(0, -2)
            self._add(units, _ACTIVATIONS, hidden_ND.sum()[None])
            self._see_vectors(gram_name(units.kind), units.layer, hidden_ND)
            for criterion in self._observing(units, "inputs"):
                for rows in row_blocks(hidden_ND, scratch_bytes=16):
                    self._reduce(units, criterion, of_experts, rows, widened(hidden_ND[rows]))
        if torch.is_grad_enabled():
            hidden_BTD = self._in_graph(units, hidden_BTD)
            if is_observed:
                observe_gradient(hidden_BTD, partial(self._see_effects, units, of_experts))
        return (hidden_BTD, *of_experts)

    def _after(self, units: SeenUnits, _module: nn.Module, inputs: tuple[Any, ...], output_BTC: Tensor) -> None:
        """Hook that runs after an output projection."""
        if self.phase.backward_of is None and self.phase.student is None:
            for criterion in self._observing(units, "expert_outputs"):
                _, *of_experts = inputs
                outputs_NC, weights_N = widened(output_BTC.detach()), of_experts[1].detach()
                self._reduce(units, criterion, of_experts, slice(None), outputs_NC, weights_N)
        if output_BTC.requires_grad:
            for criterion in self.criteria:
                if criterion.needs_moments and criterion.has_sums_of(units.kind):
                    output_BTC.register_hook(partial(self._show_output_gradients, units, criterion.loss))

    def _show_output_gradients(self, units: SeenUnits, loss: Loss | None, gradient_BTC: Tensor) -> None:
        if self.phase.backward_of is loss:
            self._see_vectors(units.kind, units.layer, gradient_BTC.flatten(0, -2))

    def _in_graph(self, units: SeenUnits, hidden_BTD: Tensor) -> Tensor:
        """Return h in a form whose gradient can be observed, masked if the student lacks some of these units.

        In the first layer, h is kept even if a gated product could recompute it: the graph begins with h if no other
        units are scored, and scores must have the same bits if others are.
        """
        if not hidden_BTD.requires_grad:
            hidden_BTD = hidden_BTD.detach().requires_grad_()
        if self.phase.student is not None and units.kind in self.phase.student:
            keeps_U = self.phase.student[units.kind][units.layer]
            return hidden_BTD * keeps_U.repeat_interleave(units.channels_per_unit)
        is_first = units.layer == self._first[units.kind]
        return hidden_BTD if not is_first and can_be_observed(hidden_BTD) else observed(hidden_BTD)

    def _see_effects(self, units: SeenUnits, of_experts: Sequence[Tensor], product_ND: Tensor, rows: slice) -> None:
        """Observe some tokens' h * dL/dh."""
        assert self.phase.backward_of is not None, "a backward that is not ours"
        channels = units.channels_per_unit
        effects_NU = product_ND if channels == 1 else product_ND.unflatten(-1, (-1, channels)).sum(dim=-1)
        for criterion in self._observing(units, "effects"):
            if criterion.loss is self.phase.backward_of:
                self._reduce(units, criterion, of_experts, rows, effects_NU)

    def _see_weights(self, units: SeenUnits, criterion: Criterion, owned: Sequence[OwnedRows]) -> None:
        """Observe a micro-batch's weights of a layer."""
        assert criterion.reduce is not None
        self._add(units, criterion.name, criterion.reduce(owned))

    def _reduce(
        self, units: SeenUnits, criterion: Criterion, of_experts: Sequence[Tensor], rows: slice, *seen: Tensor
    ) -> None:
        """Reduce what a criterion observes of some of a layer's tokens, and add it up; for each expert by itself."""
        assert criterion.reduce is not None
        terms_NS = criterion.reduce(*seen)
        if of_experts:
            sums_ES = terms_NS.new_zeros(units.experts, terms_NS.shape[1])
            self._add(units, criterion.name, sums_ES.index_add_(0, of_experts[0][rows], terms_NS).view(-1))
        else:
            self._add(units, criterion.name, terms_NS.sum(dim=0))

    def _add(self, units: SeenUnits, name: str, sum_N: Tensor) -> None:
        key = units.kind, units.layer, name
        self._seen[key] = self._seen[key] + sum_N if key in self._seen else sum_N
