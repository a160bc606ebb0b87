"""Biases that replace removed channels by their mean outputs on the dense model's activations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.core.selection import entries_of
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.layer_work import unfinished, up_to_last
from hfprune_dist.distributed.world import World
from hfprune_dist.models.single_layer import output_of
from hfprune_dist.refit.refitted_layers import OTHER_REFIT
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units


def find_biases(
    checkpoint: Checkpoint,
    kept: Kept,
    kinds: Sequence[Units],
    stream: LayerStream,
    saved: SavedLayers,
    world: World,
    after_each: AfterLayer,
) -> None:
    """Find biases that restore the mean outputs of output projections (FLAP: An et al. 2023, arXiv 2312.11983).

    Args:
        kept: what stays of the checkpoint.
        kinds: the kinds of units whose output projections get biases.
        stream: the checkpoint's windows before the first layer.
        saved: where the biases of layers are saved, by their names in the checkpoint and in the dtypes of the weights.

    Raises:
        UserError: as ``LayerStream.channel_means`` and ``as_stored`` do.
    """

    def biases(number: int, layer: nn.Module, means: Mapping[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for units in kinds:
            bias_C = _bias(layer, units, kept.of_layer(number, units.kind), means[units.kind])
            name, like = (units.tensor(number, f"{units.output}.{part}") for part in ("bias", "weight"))
            found[name] = as_stored(checkpoint, name, bias_C, like=like, otherwise=OTHER_REFIT).cpu()
        return found

    left = unfinished(kept.layers, saved.done, world)
    for number, layer in stream.layers(up_to_last(left)):
        if number in left:
            means = stream.channel_means(number, layer, kinds)
            if world.is_first:
                saved.write(number, biases(number, layer, means))
        else:
            stream.advance(layer)
        del layer
        after_each(number + 1)
    world.barrier()  # what rank 0 has saved is read next


def _bias(layer: nn.Module, units: Units, kept_U: Tensor, mean_D: Tensor) -> Tensor:
    """Return the mean output of the channels that go, plus the bias that was there."""
    output = output_of(layer, units)
    kept_K = entries_of(kept_U, units.channels_per_unit).to(mean_D.device)
    goes_D = torch.ones_like(mean_D, dtype=torch.bool).index_fill_(0, kept_K, False)
    bias_C: Tensor = output.weight.data[:, goes_D].double() @ mean_D[goes_D]
    return bias_C if output.bias is None else bias_C + output.bias.data
