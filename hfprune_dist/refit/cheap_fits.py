"""Layers of candidates with a cheap refit: least squares on the dense model's activations, for many sizes at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.core.selection import entries_of, top_units_of_each
from hfprune_dist.distributed.float64_sum import explaining
from hfprune_dist.distributed.gram_sums import Grams
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.world import World
from hfprune_dist.models.single_layer import output_of, weights_kept
from hfprune_dist.refit.least_squares_fit import projections_of, ridge_of_all_ranks
from hfprune_dist.refit.measurement import Candidate, Choice, Weights
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class Scored:
    """Units of one kind, and their scores in each layer, which keeps the units that score highest."""

    units: Units
    scores: Sequence[Tensor]

    def kept(self, layer: int, count: int) -> Tensor:
        """Ascending indices of the units that a layer keeps if it keeps ``count`` of them."""
        return top_units_of_each(self.scores[layer], count, self.units.parts)


def kept_of(kinds: Sequence[Scored], candidate: Candidate) -> Kept:
    """What a candidate keeps: the units that score highest, in the layers that stay.

    Args:
        kinds: in the order of a choice's numbers.
    """
    staying = [(layer, choice) for layer, choice in enumerate(candidate) if choice is not None]
    units = {
        scored.units.kind: [scored.kept(layer, choice[place]) for layer, choice in staying]
        for place, scored in enumerate(kinds)
    }
    return Kept(tuple(layer for layer, _ in staying), units)


class CheapFits:
    """``Variants`` in which a choice is how many units of each kind stay.

    Args:
        kinds: in the order of a choice's numbers.
        stream: windows before the first layer; None if nothing is fitted and layers need no check.
        refit: whether output projections are fitted, on the stream's windows that are not held out.
    """

    def __init__(self, kinds: Sequence[Scored], stream: LayerStream | None, refit: bool, world: World) -> None:
        self._kinds = kinds
        self._stream = stream
        self._refit = refit
        self._world = world

    def weights(self, number: int, layer: nn.Module, choices: Sequence[Choice]) -> Mapping[Choice, Weights]:
        """See ``Variants``; ranks share the work.

        Raises:
            UserError: as ``LayerStream.grams`` and ``explaining`` do.
        """
        grams: Mapping[str, Sequence[Grams]] = {}
        if self._refit:
            assert self._stream is not None, "nothing to fit on"
            grams = self._stream.grams(number, layer, [it.units for it in self._kinds])
        else:
            self.go_past(layer)
        of_kinds = [
            self._of_kind(number, layer, scored, sorted({choice[place] for choice in choices}), grams)
            for place, scored in enumerate(self._kinds)
        ]
        return {
            choice: {
                name: weight
                for count, of_kind in zip(choice, of_kinds, strict=True)
                for name, weight in of_kind[count].items()
            }
            for choice in choices
        }

    def go_past(self, layer: nn.Module) -> None:
        """See ``Variants``."""
        if self._stream is not None:
            self._stream.advance(layer)

    def _of_kind(
        self, number: int, layer: nn.Module, scored: Scored, counts: Sequence[int], grams: Mapping[str, Sequence[Grams]]
    ) -> dict[int, Weights]:
        """Number of units that stay -> weights that the layer's units of one kind own then."""
        units, most = scored.units, len(scored.scores[number])
        kept = {count: scored.kept(number, count) for count in counts if count < most}
        of_kind = grams.get(units.kind)
        fitted: Mapping[int, Tensor] = {}
        if of_kind is not None and kept:
            fitted = self._fitted(number, layer, units, kept, of_kind[0])
        weights = {most: weights_kept(layer, units)}
        for count, kept_K in kept.items():
            weights[count] = weights_kept(layer, units, kept_K)
            if count in fitted:
                name = f"{units.output}.weight"
                weights[count][name] = fitted[count].to(weights[count][name])
        return weights

    def _fitted(
        self, number: int, layer: nn.Module, units: Units, kept: Mapping[int, Tensor], grams: Grams
    ) -> dict[int, Tensor]:
        """The output projection for every number of units, fitted on windows not held out; one ridge for all."""
        weight_CD = output_of(layer, units).weight.data.double()
        channels = {count: entries_of(kept_K, units.channels_per_unit) for count, kept_K in kept.items()}
        on_device = {count: channels_K.to(weight_CD.device) for count, channels_K in channels.items()}
        fewest_K = on_device[min(on_device)]
        fitted, held_out = projections_of(weight_CD, grams, self._world)
        with explaining(number):
            best, _ = ridge_of_all_ranks(fitted.keeping(fewest_K), held_out.keeping(fewest_K), self._world)
        del held_out
        empty = partial(weight_CD.new_empty, dtype=torch.float32)
        weights = {count: empty(len(weight_CD), len(channels_K)) for count, channels_K in on_device.items()}
        owners = {count: place % self._world.size for place, count in enumerate(on_device)}
        with explaining(number):  # more channels may be lost in rounding with a ridge that fewer do with
            for count in (count for count, owner in owners.items() if owner == self._world.rank):
                weights[count].copy_(fitted.keeping(on_device[count]).weight(best.ridge))
        for count, owner in owners.items():
            self._world.broadcast_tensor(weights[count], owner)
        return weights
