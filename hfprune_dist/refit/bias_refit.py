"""Biases that replace removed channels by their mean outputs on the dense model's activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hfprune_dist.core.selection import entries_of
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.sums import Float64Sum
from hfprune_dist.models.single_layer import output_of
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units


def find_biases(
    kept: Kept, kinds: Sequence[Units], stream: LayerStream, found: RefittedLayers, after_each: AfterLayer
) -> None:
    """Find biases that restore the mean outputs of output projections (FLAP: An et al. 2023, arXiv 2312.11983).

    Args:
        kinds: the units whose output projections get biases.
        stream: the checkpoint's windows before the first layer.
        found: where rank 0 writes the biases of layers; those that are there stay.

    Raises:
        UserError: as ``Float64Sum.of_all_ranks`` and ``RefittedLayers.rounded`` do.
    """
    for number, layer, is_left in stream.layers_left(kept.layers, found.done, after_each):
        sums = {
            units.output: Float64Sum(number, [output_of(layer, units).in_features], stream.world)
            for units in kinds
            if is_left
        }
        for _, seen in stream.observe(layer, sums):
            for name, total in sums.items():
                total.add(seen[name][0].sum(dim=0, dtype=torch.float64))
        totals = Float64Sum.of_all_ranks([*sums.values()]) if is_left else []
        if is_left and stream.world.is_first:
            means = {name: total / stream.windows_ST.numel() for name, total in zip(sums, totals, strict=True)}
            biases = {
                f"{units.output}.bias": _bias(layer, units, kept.of_layer(number, units.kind), means[units.output])
                for units in kinds
            }
            found.write_rounded(number, biases)
        del layer


def _bias(layer: nn.Module, units: Units, kept_U: Tensor, mean_D: Tensor) -> Tensor:
    """The mean output of the channels that go, plus the bias that was there."""
    output = output_of(layer, units)
    kept_K = entries_of(kept_U, units.channels_per_unit).to(mean_D.device)
    goes_D = torch.ones_like(mean_D, dtype=torch.bool).index_fill_(0, kept_K, False)
    bias_C: Tensor = output.weight.data[:, goes_D].double() @ mean_D[goes_D]
    return bias_C if output.bias is None else bias_C + output.bias.data
