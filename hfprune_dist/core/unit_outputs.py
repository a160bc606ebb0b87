"""Where a model's units of one kind are observed: the output projections that read their channels, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from hfprune_dist.core.criteria import Criterion
from hfprune_dist.core.scored_units import scores_units


@dataclass(frozen=True)
class InputProjection:
    """A linear layer from whose outputs units' channels are made: gate and up of neurons, or q, k and v of KV groups.

    Attributes:
        parts: number of equal parts of its rows, in each of which a unit owns some: 2 if gate and up are one matrix.
    """

    module: nn.Module
    parts: int = 1


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
        input_projections: for each layer, the linear layers from whose outputs the channels are made; needed only for
            scores by weight products.
        are_neurons: whether each of a unit's channels is made by one row of every part of these.
        experts: number of experts in each layer that has such units; None if the units don't belong to experts.
        are_experts: whether each unit is a whole expert with all its channels.
    """

    projections: Sequence[nn.Module | None]
    channels_per_unit: int
    input_projections: Sequence[Sequence[InputProjection]] = ()
    are_neurons: bool = False
    experts: int | None = None
    are_experts: bool = False

    def have(self, criterion: Criterion) -> bool:
        """Return whether these units have sums for a criterion."""
        return criterion.has_sums_of_units and scores_units(
            criterion,
            are_neurons=self.are_neurons,
            are_experts=self.are_experts,
            experts=self.experts or 1,
        )

    def units(self, layer: int) -> int:
        """Return the number of units in a layer."""
        projection = self.projections[layer]
        if projection is None:
            return 0
        channels = int(projection.in_features) * (self.experts or 1)  # type: ignore[arg-type]
        return channels // self.channels_per_unit

    def seen_modules(self) -> list[tuple[int, nn.Module]]:
        """Return the numbers of the layers that have units, with their output projections."""
        return [(layer, module) for layer, module in enumerate(self.projections) if module is not None]
