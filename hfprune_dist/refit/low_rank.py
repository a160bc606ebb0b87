"""LoRAP, layer by layer: a layer reads what the model, as compressed so far, makes of the windows.

All norms of a layer come from one pass of the windows through the uncompressed layer. Then neurons go, attention gets
factors, and the windows go through the compressed layer, which is kept on disk for all ranks and for later attempts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.checkpoints.modeling_pruned import in_two
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.sums import Float64Sum
from hfprune_dist.methods.lorap import channel_norms, kept_neurons, low_rank_factors, neuron_scores
from hfprune_dist.models.single_layer import part_of, put_weights, row_matrices, run, weights_kept
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures import NEURONS
from hfprune_dist.structures.kept import Kept, Shape
from hfprune_dist.structures.low_rank import FACTORS

KEPT = "kept"


def compress_layers(
    checkpoint: Checkpoint, shape: Shape, stream: LayerStream, done: RefittedLayers, after_each: AfterLayer
) -> Kept:
    """Compress all layers that are not done yet, and return what stays; windows go no further than the last of these.

    Args:
        shape: numbers of neurons and ranks, in all layers.
        stream: all windows before the first layer.
        done: where rank 0 writes the factors and the neurons that stay in each layer.

    Raises:
        UserError: if what layers read is NaN or infinite; or as ``RefittedLayers.rounded`` does.
    """
    neurons = checkpoint.units
    # q, k and v read the same vectors; gate and up do, too.
    query, *_, output = checkpoint.family.attention_modules
    row, down = neurons.weights[0].removesuffix(".weight"), neurons.output
    for number, layer, is_left in stream.layers_left(shape.layers, done.done, after_each):
        if is_left:
            squares = {
                name: Float64Sum(number, [part_of(layer, name).in_features], stream.world)
                for name in (query, output, row, down)
            }
            for _, seen in stream.observe(layer, squares, stay=True):
                for name, total in squares.items():
                    total.add(seen[name][0].double().square().sum(dim=0))
            totals = zip(squares, Float64Sum.of_all_ranks([*squares.values()]), strict=True)
            read = {name: channel_norms(total_I, len(stream.windows_ST)) for name, total_I in totals}
            if stream.world.is_first:
                factors: dict[str, Tensor] = {}
                for projection, ranks in shape.ranks.items():
                    norms_I = read[projection if projection == output else query]
                    pair = low_rank_factors(part_of(layer, projection).weight.data, norms_I, ranks[number])
                    factors |= zip(_names(projection), pair, strict=True)
                down_CK = part_of(layer, down).weight.data
                scores_K = neuron_scores(row_matrices(layer, neurons), down_CK, read[row], read[down])
                done.write_rounded(number, factors, kept=kept_neurons(scores_K, shape.units[NEURONS][number]))
            stream.world.barrier()
        put_weights(layer, weights_kept(layer, neurons, done.tensor(number, KEPT)))
        install_factors(layer, shape.ranks, done.weights(number, like=part_of(layer, down).weight))
        stream.advance(partial(run, layer))
        del layer
    return Kept(shape.layers, {NEURONS: [done.tensor(number, KEPT) for number in shape.layers]}, shape.ranks)


def install_factors(layer: nn.Module, projections: Iterable[str], factors: Mapping[str, Tensor]) -> None:
    """Replace projections of a layer by two linear modules each.

    Args:
        factors: name of a weight within the layer -> the weight.
    """
    for projection in projections:
        whole, pair = part_of(layer, projection), [factors[name] for name in _names(projection)]
        with torch.device("meta"):
            two = in_two(whole, len(pair[0]))
        for linear, weight in zip(two, pair, strict=True):
            linear.weight = nn.Parameter(weight, requires_grad=False)
        two[-1].bias = whole.bias
        block, _, name = projection.rpartition(".")
        setattr(part_of(layer, block), name, two)


def _names(projection: str) -> list[str]:
    return [f"{projection}.{factor}.weight" for factor in FACTORS]
