"""Layers of candidates that are measured next to each other.

``CheapFits`` fits them for many sizes at once, by least squares on the dense model's activations; ``FinishedLayers``
are those of models that have been refitted already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfprune_dist.core.least_squares import Projection, best_ridge
from hfprune_dist.core.selection import entries_of, top_units
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.sums import Grams, explaining
from hfprune_dist.distributed.world import World
from hfprune_dist.models.single_layer import output_of, weights_kept
from hfprune_dist.refit.measurement import Candidate, Choice, Weights
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class Scored:
    """Units of one kind, and their scores in each layer, which keeps the units that score highest."""

    units: Units
    scores: Sequence[Tensor]

    def kept(self, layer: int, count: int) -> Tensor:
        """Ascending indices of the units that a layer keeps if it keeps ``count`` of them."""
        return top_units(self.scores[layer], count, self.units.parts)


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
        stream: windows before the first layer, on which output projections are fitted; None to keep their weights.
    """

    def __init__(self, kinds: Sequence[Scored], stream: LayerStream | None, world: World) -> None:
        self._kinds = kinds
        self._stream = stream
        self._world = world

    def weights(self, number: int, layer: nn.Module, choices: Sequence[Choice]) -> Mapping[Choice, Weights]:
        """See ``Variants``; ranks share the work.

        Raises:
            UserError: as ``LayerStream.grams`` and ``explaining`` do.
        """
        grams: Mapping[str, Sequence[Grams]] = {}
        if self._stream is not None:
            grams = self._stream.grams(number, layer, [it.units for it in self._kinds])
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
        weight_CD, world = output_of(layer, units).weight.data.double(), self._world
        channels = {
            count: entries_of(kept_K, units.channels_per_unit).to(weight_CD.device) for count, kept_K in kept.items()
        }
        fitted = Projection(weight_CD, grams.fitted_DD)

        def ridge_of_fewest() -> float:
            fewest_K = channels[min(channels)]
            return best_ridge(
                fitted.keeping(fewest_K), Projection(weight_CD, grams.held_out_DD).keeping(fewest_K)
            ).ridge

        weights: dict[int, Tensor] = {}
        with explaining(number):  # more channels may be lost in rounding with a ridge that fewer do with
            ridge = world.on_rank0(ridge_of_fewest)
            for place, (count, channels_K) in enumerate(channels.items()):
                if place % world.size == world.rank:
                    weights[count] = fitted.keeping(channels_K).weight(ridge).float().contiguous()
                else:
                    weights[count] = weight_CD.new_empty(len(weight_CD), len(channels_K), dtype=torch.float32)
        for place, weight_CK in enumerate(weights.values()):
            world.broadcast_tensor(weight_CK, place % world.size)
        return weights


def candidates_of(kepts: Sequence[Kept], num_layers: int) -> list[Candidate]:
    """Return one candidate for each refitted model; in every layer that it keeps, its choice is the model's index.

    Args:
        kepts: what each model keeps.
        num_layers: number of layers before pruning.
    """
    return [
        tuple((model,) if layer in kept.layers else None for layer in range(num_layers))
        for model, kept in enumerate(kepts)
    ]


class FinishedLayers:
    """``Variants`` in which a choice is the index of one of these models.

    Args:
        models: what each keeps, and its refitted layers.
    """

    def __init__(self, models: Sequence[tuple[Kept, RefittedLayers]]) -> None:
        self._models = models

    def weights(self, number: int, layer: nn.Module, choices: Sequence[Choice]) -> Mapping[Choice, Weights]:
        """See ``Variants``."""
        return {choice: self._of_model(number, layer, choice) for choice in choices}

    def _of_model(self, number: int, layer: nn.Module, choice: Choice) -> Weights:
        (model,) = choice
        kept, fitted = self._models[model]
        weights = {
            name: it
            for units in fitted.kinds
            for name, it in weights_kept(layer, units, kept.of_layer(number, units.kind)).items()
        }
        return weights | fitted.weights(number, like=next(iter(weights.values())))
