"""Refits on the dense model's activations, in which no layer depends on another's."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfprune_dist.core.selection import entries_of
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.layer_work import Turns, unfinished, up_to_last
from hfprune_dist.distributed.sums import Grams, explaining
from hfprune_dist.distributed.world import World
from hfprune_dist.models.experts import output_weights
from hfprune_dist.refit.least_squares_fit import ProjectionFit, Solution, solve
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units


@dataclass(frozen=True)
class _Unsolved:
    """A layer that is waiting to be solved.

    Attributes:
        weights, grams: kind of units -> the weights of its output projections, and the Gram matrices of what these
            read: one for each expert, or a single one.
    """

    number: int
    weights: dict[str, list[Tensor]]
    grams: dict[str, list[Grams]]


class DenseRefit:
    """Fits output projections to their dense outputs, from the kept channels of the dense model's activations.

    In a mixture of experts, each expert is fitted on the tokens that it is given. Errors count by the square of the
    routing weight, by which the expert's output is multiplied. An expert with few tokens stays closer to its old weight
    (``solve``), and one with none keeps its columns as they are.

    Args:
        kept: what stays of the model.
        stream: the model's windows before the first layer.
        fitted: where refitted layers are written; its kinds of units say which output projections are fitted.
    """

    def __init__(self, kept: Kept, stream: LayerStream, fitted: RefittedLayers, world: World) -> None:
        self._kept = kept
        self._stream = stream
        self._fitted = fitted
        self._world = world

    def run(self, after_each: AfterLayer) -> None:
        """Refit all layers that stay and are not done yet.

        Raises:
            UserError: as ``LayerStream.grams``, ``explaining`` and ``RefittedLayers.rounded`` do.
        """
        left = unfinished(self._kept.layers, self._fitted.done, self._world)
        turns = Turns(left, self._world, self._solve)
        for number, layer in self._stream.layers(up_to_last(left)):
            if number in left:
                turns.add(number, self._prepared(number, layer, turns.owner(number)))
            else:
                self._stream.advance(layer)
            del layer
            after_each(number + 1)

    def _prepared(self, number: int, layer: nn.Module, owner: int) -> _Unsolved | None:
        """Take the stream past a layer, and return what solving it takes, if this rank solves it."""
        kinds = self._fitted.kinds_of(number)
        grams = self._stream.grams(number, layer, kinds, owner)
        if owner != self._world.rank:
            return None
        weights = {units.kind: output_weights(layer, units) for units in kinds}
        if self._world.size > 1:  # while the layer waits, experts would fill most of a GPU
            for kind in (units.kind for units in kinds if units.experts > 1):
                weights[kind] = [it.cpu() for it in weights[kind]]
                grams[kind] = [it.to(torch.device("cpu")) for it in grams[kind]]
        return _Unsolved(number, weights, grams)

    def _solve(self, unsolved: _Unsolved) -> None:
        tensors: dict[str, Tensor] = {}
        fits: dict[str, ProjectionFit] = {}
        for units in self._fitted.kinds_of(unsolved.number):
            solutions = self._solutions(unsolved, units)
            tensors |= output_tensors(units, [it.whole_CK for it in solutions])
            fits[units.kind] = fit_of_all(solutions)
        self._fitted.write(unsolved.number, tensors, fits)

    def _solutions(self, unsolved: _Unsolved, units: Units) -> list[Solution]:
        """Fit the output projection of each expert, or the single one."""
        device, number, solutions = self._world.device, unsolved.number, []
        width, is_expert = units.counts[number] // units.experts, units.experts > 1
        both = zip(unsolved.weights[units.kind], unsolved.grams[units.kind], strict=True)
        for expert, (weight_CD, grams) in enumerate(both):
            kept_U = self._kept.of_layer(number, units.kind).chunk(units.experts)[expert]
            channels_K = entries_of(kept_U - width * expert, units.channels_per_unit).to(device)
            with explaining(number):
                solutions.append(solve(weight_CD.to(device), grams.to(device), channels_K, expert=is_expert))
        return solutions


def fit_of_all(solutions: Sequence[Solution]) -> ProjectionFit:
    """The fit of one projection; or of several together, weighted by the energies of their targets."""
    if len(solutions) == 1:
        return solutions[0].fit
    energy = sum(it.energy for it in solutions)
    lost_before = sum(it.energy * it.fit.error_before for it in solutions)
    lost_after = sum(it.energy * it.fit.error_after for it in solutions)
    ridge = statistics.median_low(it.fit.ridge for it in solutions)
    return ProjectionFit(ridge, *((lost_before / energy, lost_after / energy) if energy else (0.0, 0.0)))


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
