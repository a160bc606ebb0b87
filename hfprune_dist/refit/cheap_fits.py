"""Least squares for many sizes of a layer at once, on the dense model's activations."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import getitem

import torch
from torch import Tensor, nn

from hfprune_dist.core.devices import send
from hfprune_dist.core.gram import UnresolvedError
from hfprune_dist.core.least_squares import Projection
from hfprune_dist.core.selection import entries_of, top_units
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.sums import naming_layer
from hfprune_dist.distributed.world import World
from hfprune_dist.models.single_layer import output_of, weights_kept
from hfprune_dist.structures.kept import Kept, Shape
from hfprune_dist.structures.units import Units

# The ridge of fits is what a typical channel adds to so many tokens. One that held-out windows chose left 2 % less
# divergence, and shapes in the same order, for five more solves in each layer.
RIDGE_TOKENS = 2**9
# How many units of each kind a layer keeps -> its weights then, by their names within it.
Fits = Mapping[tuple[int, ...], Mapping[str, Tensor]]


@dataclass(frozen=True)
class Scored:
    """Units of one kind, and their scores in each layer, which keeps the units that score highest."""

    units: Units
    scores: Sequence[Tensor]

    def kept(self, layer: int, count: int) -> Tensor:
        """Ascending indices of the units that a layer keeps if it keeps ``count`` of them."""
        return top_units(self.scores[layer], count, self.units.parts)


def kept_of(kinds: Sequence[Scored], shape: Shape) -> Kept:
    """What a model with a shape keeps: the units that score highest, in the layers that stay."""
    of_kind = {scored.units.kind: scored for scored in kinds}
    units = {
        kind: [scored.kept(*place) for place in zip(shape.layers, shape.units[kind], strict=True)]
        for kind, scored in of_kind.items()
    }
    return Kept(shape.layers, units)


def cheap_fits(
    number: int,
    layer: nn.Module,
    kinds: Sequence[Scored],
    sizes: Sequence[tuple[int, ...]],
    stream: LayerStream | None,
    world: World,
) -> Fits:
    """Weights of a layer for each of some sizes; collective, ranks share the work.

    Args:
        sizes: numbers of units of each of the kinds.
        stream: windows before this layer, on which output projections are fitted; None to keep their weights.

    Raises:
        UserError: as ``LayerStream.grams`` and ``naming_layer`` do.
    """
    grams = {} if stream is None else stream.grams(number, layer, [scored.units for scored in kinds])
    of_kinds = []
    for place, scored in enumerate(kinds):
        units = scored.units
        kept = {count: scored.kept(number, count) for count in sorted({size[place] for size in sizes})}
        weights = {count: weights_kept(layer, units, kept_K) for count, kept_K in kept.items()}
        kept.pop(len(scored.scores[number]), None)  # what loses nothing needs no fit
        if kept and stream is not None:
            ridge, gram_DD = RIDGE_TOKENS / stream.windows_ST.numel(), grams[units.kind][0].fitted_DD
            for count, fitted_CK in _fitted(number, layer, units, kept, gram_DD, ridge, world).items():
                name = f"{units.output}.weight"
                weights[count][name] = fitted_CK.to(weights[count][name])
        of_kinds.append(weights)
    return {size: dict(ChainMap(*map(getitem, of_kinds, size))) for size in sizes}


def _fitted(
    number: int, layer: nn.Module, units: Units, kept: Mapping[int, Tensor], gram_DD: Tensor, ridge: float, world: World
) -> dict[int, Tensor]:
    """The output projection for every number of units; ranks take turns at them."""
    weight_CD = output_of(layer, units).weight.data
    projection, weights, problems = Projection(weight_CD, gram_DD), dict[int, Tensor](), list[Tensor]()
    for place, (count, kept_U) in enumerate(kept.items()):
        channels_K = send(entries_of(kept_U, units.channels_per_unit), weight_CD.device)
        if place % world.size == world.rank:
            weights[count], problem = projection.keeping(channels_K).solved(ridge)
            problems.append(problem)
        else:
            weights[count] = weight_CD.new_empty(len(weight_CD), len(channels_K), dtype=torch.float32)
    with naming_layer(number):
        if problems and torch.stack(problems).any():  # only now does a GPU's host wait
            raise UnresolvedError
    for place, weight_CK in enumerate(weights.values()):
        world.broadcast_tensor(weight_CK, place % world.size)
    return weights
