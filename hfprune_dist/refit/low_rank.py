"""LoRAP, layer by layer: a layer reads what the model, as compressed so far, makes of the windows.

All norms of a layer come from one pass of the windows through the uncompressed layer. Then neurons go, attention gets
factors, and the windows go through the compressed layer, which is kept on disk for all ranks and for later attempts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.modeling_pruned import in_two
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.checkpoints.tensor_files import SavedLayers
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.layer_work import unfinished, up_to_last
from hfprune_dist.distributed.world import World
from hfprune_dist.methods.lorap import channel_norms, kept_neurons, low_rank_factors, neuron_scores
from hfprune_dist.models.single_layer import linear_of, part_of, put_weights, row_matrices, weights_kept
from hfprune_dist.structures.low_rank import FACTORS

KEPT = "kept"
# What helps against factors that are too large, besides another dtype.
OTHER_METHOD = "choose a method with another allocation"


@dataclass(frozen=True)
class Sizes:
    """Sizes that every layer is left with.

    Attributes:
        width: number of neurons.
        ranks: name, within a layer, of each projection that gets a low rank -> that rank.
    """

    width: int
    ranks: Mapping[str, int]


class LowRankLayers:
    """One file per layer, with the neurons that stay and the factors; its presence says that the layer is done.

    Args:
        checkpoint: the model that is pruned.
        projections: names, within a layer, of the projections that get a low rank.
        folder: written by one rank and read by all.
    """

    def __init__(self, checkpoint: Checkpoint, projections: Sequence[str], folder: Path) -> None:
        self._checkpoint = checkpoint
        self._projections = projections
        self._files = SavedLayers(folder, range(checkpoint.num_layers))

    def done(self) -> set[int]:
        """Numbers of the layers that are done. Damaged files are set aside, and their layers don't count."""
        return self._files.done()

    def write(self, number: int, kept: Tensor, factors: Mapping[str, Sequence[Tensor]]) -> None:
        """Publish a layer, rounded to the checkpoint's dtypes.

        Args:
            kept: ascending int64 indices of the neurons that stay.
            factors: name of a projection within the layer -> its factors, in the order in which they are applied.

        Raises:
            UserError: as ``as_stored`` does.
        """
        tensors = {KEPT: kept}
        for projection, pair in factors.items():
            like = self._stored(number, f"{projection}.weight")
            for name, weight in zip(self._factors(number, projection), pair, strict=True):
                rounded = as_stored(self._checkpoint, name, weight, like=like, otherwise=OTHER_METHOD)
                tensors[name] = rounded.cpu().contiguous()
        self._files.write(number, tensors)

    def kept(self, number: int) -> Tensor:
        """The neurons that stay in a layer that is done."""
        return self._files.tensor(number, KEPT)

    def install(self, number: int, layer: nn.Module) -> None:
        """Turn a layer that ``LayerReader`` has made from the checkpoint into what its file says."""
        put_weights(layer, weights_kept(layer, self._checkpoint.units, self.kept(number)))
        for projection in self._projections:
            whole = linear_of(layer, projection)
            pair = [self._files.tensor(number, name).to(whole.weight) for name in self._factors(number, projection)]
            with torch.device("meta"):
                two = in_two(whole, len(pair[0]))
            for linear, weight in zip(two, pair, strict=True):
                linear.weight = nn.Parameter(weight, requires_grad=False)
            two[-1].bias = whole.bias
            block, _, name = projection.rpartition(".")
            setattr(part_of(layer, block), name, two)

    def replacements(self) -> dict[str, Callable[[], Tensor]]:
        """Name of every factor of all layers -> function that reads it."""
        return {
            name: partial(self._files.tensor, number, name)
            for number in range(self._checkpoint.num_layers)
            for projection in self._projections
            for name in self._factors(number, projection)
        }

    def _factors(self, number: int, projection: str) -> list[str]:
        return [self._stored(number, f"{projection}.{factor}.weight") for factor in FACTORS]

    def _stored(self, number: int, name: str) -> str:
        return self._checkpoint.units.tensor(number, name)


def compress_layers(
    checkpoint: Checkpoint,
    sizes: Sizes,
    stream: LayerStream,
    layers: LowRankLayers,
    world: World,
    after_each: AfterLayer,
) -> None:
    """Compress all layers that are not done yet; windows go no further than the last of these.

    Args:
        stream: all windows before the first layer.
        layers: where rank 0 writes compressed layers.

    Raises:
        UserError: if what layers read is NaN or infinite; or as ``as_stored`` does.
    """
    neurons = checkpoint.units
    # q, k and v read the same vectors; gate and up do, too.
    query, *_, output = checkpoint.family.attention_modules
    row, down = neurons.weights[0].removesuffix(".weight"), neurons.output

    def compress(number: int, layer: nn.Module, squares: Mapping[str, Tensor]) -> None:
        norms = {name: channel_norms(it, len(stream.windows_ST)) for name, it in squares.items()}
        down_CK = linear_of(layer, down).weight.data
        scores_K = neuron_scores(row_matrices(layer, neurons), down_CK, norms[row], norms[down])
        factors = {}
        for projection, rank in sizes.ranks.items():
            read_I = norms[projection if projection == output else query]
            factors[projection] = low_rank_factors(linear_of(layer, projection).weight.data, read_I, rank)
        layers.write(number, kept_neurons(scores_K, sizes.width), factors)

    left = unfinished(range(stream.num_layers), layers.done, world)
    for number, layer in stream.layers(up_to_last(left)):
        if number in left:
            squares = stream.squares(number, layer, [query, output, row, down])
            if world.is_first:
                compress(number, layer, squares)
            world.barrier()
        layers.install(number, layer)
        stream.advance(layer)
        del layer
        after_each(number + 1)
