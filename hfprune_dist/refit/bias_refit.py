"""Biases that replace removed channels by their mean outputs on the dense model's activations."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.core.selection import entries_of
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.unfinished import unfinished, up_to_last
from hfprune_dist.distributed.world import World
from hfprune_dist.models.single_layer import output_of
from hfprune_dist.refit.refitted_layers import OTHER_REFIT
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units


class BiasRefit:
    """Biases that restore the mean outputs of output projections (FLAP: An et al. 2023, arXiv 2312.11983).

    Args:
        kept: what stays of the checkpoint.
        kinds: the kinds of units whose output projections get biases.
        stream: the checkpoint's windows before the first layer.
        saved: where the biases of layers are saved, by their names in the checkpoint and in the dtypes of the weights.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: Kept,
        kinds: Sequence[Units],
        stream: LayerStream,
        saved: SavedLayers,
        *,
        world: World,
    ) -> None:
        self._checkpoint = checkpoint
        self._kept = kept
        self._kinds = kinds
        self._stream = stream
        self._saved = saved
        self._world = world

    def run(self, after_each: AfterLayer) -> None:
        """Find the biases of all layers that stay and are not done yet.

        Raises:
            UserError: as ``LayerStream.channel_means`` and ``as_stored`` do.
        """
        left = unfinished(self._kept.layers, self._saved.done, self._world)
        for number, layer in self._stream.layers(up_to_last(left)):
            if number in left:
                means = self._stream.channel_means(number, layer, self._kinds)
                self._world.on_rank0(partial(self._write, number, layer, means))
            else:
                self._stream.advance(layer)
            del layer
            after_each(number + 1)

    def _write(self, number: int, layer: nn.Module, means: dict[str, Tensor]) -> None:
        self._saved.write(number, dict(self._bias(number, layer, it, means) for it in self._kinds))

    def _bias(self, number: int, layer: nn.Module, units: Units, means: dict[str, Tensor]) -> tuple[str, Tensor]:
        """Return a bias's name and value: the mean output of the channels that go, plus the bias that was there."""
        output, mean_D = output_of(layer, units), means[units.kind]
        kept_K = entries_of(self._kept.of_layer(number, units.kind), units.channels_per_unit).to(mean_D.device)
        goes_D = torch.ones_like(mean_D, dtype=torch.bool).index_fill_(0, kept_K, False)
        bias_C = output.weight.data[:, goes_D].double() @ mean_D[goes_D]
        if output.bias is not None:
            bias_C += output.bias.data
        name, like = units.output_bias(number), units.output_weight(number)
        return name, as_stored(self._checkpoint, name, bias_C, like=like, otherwise=OTHER_REFIT).cpu()
