"""Refits on the dense model's activations, in which no layer depends on another's."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.core.selection import entries_of
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.sums import Grams, explaining
from hfprune_dist.models.experts import output_weights
from hfprune_dist.models.single_layer import run
from hfprune_dist.refit.least_squares_fit import solve
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units


def refit_on_dense(
    kept: Kept, kinds: Sequence[Units], stream: LayerStream, fitted: RefittedLayers, after_each: AfterLayer
) -> None:
    """Fit output projections to their dense outputs, from the kept channels of the dense model's activations.

    In a mixture of experts, each expert is fitted on the tokens that it is given. Errors count by the square of the
    routing weight, by which the expert's output is multiplied. An expert with few tokens stays closer to its old weight
    (``solve``), and one with none keeps its columns as they are.

    Args:
        kinds: the units whose output projections are fitted.
        stream: the model's windows before the first layer.
        fitted: where rank 0 writes refitted layers; those that are there stay.

    Raises:
        UserError: as ``LayerStream.grams``, ``explaining`` and ``RefittedLayers.rounded`` do.
    """
    for number, layer, is_left in stream.unfinished(kept.layers, fitted.done, after_each):
        there = [units for units in kinds if units.counts[number]]
        if not is_left:
            stream.advance(partial(run, layer))
        else:
            grams = stream.grams(number, layer, there, owner=0)
            if stream.world.is_first:
                tensors: dict[str, Tensor] = {}
                for units in there:
                    with explaining(number):
                        weights = _solved(layer, units, kept.of_layer(number, units.kind), grams.pop(units.kind))
                    tensors |= output_tensors(units, weights)
                fitted.write_rounded(number, tensors)
            del grams
        del layer


def _solved(layer: nn.Module, units: Units, kept_U: Tensor, grams: Sequence[Grams]) -> list[Tensor]:
    """Fit the output projection of each expert, or the single one."""
    solved, is_expert = [], units.experts > 1
    for expert, (weight_CD, of_expert) in enumerate(zip(output_weights(layer, units), grams, strict=True)):
        first = weight_CD.shape[1] // units.channels_per_unit * expert
        channels_K = entries_of(kept_U.chunk(units.experts)[expert] - first, units.channels_per_unit)
        solved.append(solve(weight_CD, of_expert, channels_K.to(weight_CD.device), expert=is_expert).whole_CK)
    return solved


def output_tensors(units: Units, weights_CK: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name within a layer -> tensor as stored in files, for the output projections of some units.

    Args:
        weights_CK: the weight of each expert [hidden_size, channels], or a single one.
    """
    first = units.columns[0]
    if first.stacked:
        whole = torch.stack([*weights_CK])
        return {first.tensor: whole if first.axis == 2 else whole.transpose(1, 2)}
    return {owned.tensor: it for owned, it in zip(units.columns, weights_CK, strict=True)}
