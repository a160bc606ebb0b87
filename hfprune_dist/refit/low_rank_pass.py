"""LoRAP, layer by layer: a layer reads what the model, as compressed so far, makes of the windows.

All norms of a layer come from one pass of the windows through the uncompressed layer. Then neurons go, attention gets
factors, and the windows go through the compressed layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.unfinished import unfinished, up_to_last
from hfprune_dist.distributed.world import World
from hfprune_dist.methods.lorap import channel_norms, kept_neurons, low_rank_factors, neuron_scores
from hfprune_dist.models.single_layer import linear_of, row_matrices
from hfprune_dist.refit.low_rank_layers import LowRankLayers


@dataclass(frozen=True)
class Sizes:
    """Sizes that every layer is left with.

    Attributes:
        width: number of neurons.
        ranks: name, within a layer, of each projection that gets a low rank -> that rank.
    """

    width: int
    ranks: Mapping[str, int]


class LowRankPass:
    """Compresses a model's layers one by one.

    Args:
        stream: all windows before the first layer.
        whole: some of the windows, which go through uncompressed layers to check them against the whole model.
        layers: where compressed layers are written.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        sizes: Sizes,
        stream: LayerStream,
        layers: LowRankLayers,
        *,
        whole: LayerStream,
        world: World,
    ) -> None:
        self._sizes = sizes
        self._stream = stream
        self._whole = whole
        self._layers = layers
        self._world = world
        self._neurons = checkpoint.units
        # q, k and v read the same vectors; gate and up do, too.
        self._query, *_, self._output = checkpoint.family.attention_modules
        self._row, self._down = self._neurons.weights[0].removesuffix(".weight"), self._neurons.output

    def run(self, after_each: AfterLayer) -> None:
        """Compress all layers that are not done yet; windows go no further than the last of these.

        Raises:
            UserError: if layers depart from the whole model, or what they read is NaN or infinite; or as ``as_stored``
                does.
        """
        left = unfinished(range(self._stream.num_layers), self._layers.done, self._world)
        for number, layer in self._stream.layers(up_to_last(left)):
            self._whole.advance(layer)
            if number in left:
                self._compress(number, layer)
            self._layers.install(number, layer)
            self._stream.advance(layer)
            del layer
            after_each(number + 1)

    def _compress(self, number: int, layer: nn.Module) -> None:
        """Compress a layer, and write it."""
        names = [self._query, self._output, self._row, self._down]
        squares = self._stream.squares(number, layer, names)
        norms = {name: channel_norms(it, len(self._stream.windows_ST)) for name, it in squares.items()}
        factors = self._factors(layer, norms)

        def write() -> None:
            self._layers.write(number, self._kept(layer, norms), self._layers.rounded(number, factors))

        self._world.on_rank0(write)

    def _kept(self, layer: nn.Module, norms: Mapping[str, Tensor]) -> Tensor:
        rows, down_CK = row_matrices(layer, self._neurons), linear_of(layer, self._down).weight.data
        scores_K = neuron_scores(rows, down_CK, norms[self._row], norms[self._down])
        return kept_neurons(scores_K, self._sizes.width)

    def _factors(self, layer: nn.Module, norms: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Factors of each projection that gets a low rank, each found by one of the ranks."""
        factors = {}
        for place, (projection, rank) in enumerate(self._sizes.ranks.items()):
            weight_OI = linear_of(layer, projection).weight.data
            outputs, inputs = weight_OI.shape
            if place % self._world.size == self._world.rank:
                read_I = norms[projection if projection == self._output else self._query]
                pair = low_rank_factors(weight_OI, read_I, rank)
            else:
                empty = partial(weight_OI.new_empty, dtype=torch.float64)
                pair = empty((rank, inputs)), empty((outputs, rank))
            factors[projection] = pair
        for place, pair in enumerate(factors.values()):
            for factor in pair:
                self._world.broadcast_tensor(factor, place % self._world.size)
        return factors
