"""Models that have been refitted already, as candidates to be measured next to each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.models.single_layer import weights_kept
from hfprune_dist.refit.measurement import Candidate, Choice, Weights
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Kept


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
        stream: windows before the first layer, to check the layers against the whole model on the way.
    """

    def __init__(self, models: Sequence[tuple[Kept, RefittedLayers]], stream: LayerStream) -> None:
        self._models = models
        self._stream = stream

    def weights(self, number: int, layer: nn.Module, choices: Sequence[Choice]) -> Mapping[Choice, Weights]:
        """See ``Variants``."""
        self._stream.advance(layer)
        return {choice: self._of_model(number, layer, choice) for choice in choices}

    def go_past(self, layer: nn.Module) -> None:
        """See ``Variants``."""
        self._stream.advance(layer)

    def _of_model(self, number: int, layer: nn.Module, choice: Choice) -> Weights:
        (model,) = choice
        kept, fitted = self._models[model]
        weights = {
            name: it
            for units in fitted.kinds
            for name, it in weights_kept(layer, units, kept.of_layer(number, units.kind)).items()
        }
        return weights | fitted.weights(number, like=next(iter(weights.values())))
