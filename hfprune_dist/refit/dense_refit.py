"""Refits on the dense model's activations, in which no layer depends on another's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfprune_dist.core.selection import entries_of
from hfprune_dist.distributed.float64_sum import explaining
from hfprune_dist.distributed.gram_sums import Grams
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.turns import Turns
from hfprune_dist.distributed.unfinished import unfinished, up_to_last
from hfprune_dist.distributed.world import World
from hfprune_dist.models.experts import output_weights
from hfprune_dist.refit.least_squares_fit import solve, solve_expert
from hfprune_dist.refit.refitted_layers import (
    FittedProjection,
    ProjectionFit,
    RefittedLayers,
    fit_of_all,
    output_tensors,
)
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
    (``solve_expert``), and one with none keeps its columns as they are.

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
        """Refit all layers that stay and are not done yet; if interrupted, ranks first solve the layers that wait.

        Raises:
            UserError: as ``LayerStream.grams``, ``explaining`` and ``RefittedLayers.rounded`` do.
        """
        staying = self._kept.layers
        left = unfinished(staying, lambda: self._fitted.done(staying), self._world)
        turns = Turns(left, self._world, self._solve)
        try:
            for number, layer in self._stream.layers(up_to_last(left)):
                if number in left:
                    turns.add(number, self._prepared(number, layer, turns.owner(number)))
                else:
                    self._stream.advance(layer)
                del layer
                after_each(number + 1)
        except Interrupted:
            turns.finish()
            raise

    def _prepared(self, number: int, layer: nn.Module, owner: int) -> _Unsolved | None:
        """Take the stream past a layer, and return what solving it takes, if this rank solves it."""
        kinds = self._fitted.kinds_of(number)
        grams = self._stream.grams(number, layer, kinds, owner)
        weights = {units.kind: output_weights(layer, units) for units in kinds}
        return self._parked(_Unsolved(number, weights, grams)) if owner == self._world.rank else None

    def _parked(self, unsolved: _Unsolved) -> _Unsolved:
        """Move tensors of experts, which may fill most of a GPU, to main memory if the layer waits for other ranks."""
        place = self._world.device if self._world.size == 1 else torch.device("cpu")
        for kind in (units.kind for units in self._fitted.kinds_of(unsolved.number) if units.experts > 1):
            unsolved.weights[kind] = [it.to(place) for it in unsolved.weights[kind]]
            unsolved.grams[kind] = [it.to(place) for it in unsolved.grams[kind]]
        return unsolved

    def _solve(self, unsolved: _Unsolved) -> None:
        tensors: dict[str, Tensor] = {}
        fits: dict[str, ProjectionFit] = {}
        for units in self._fitted.kinds_of(unsolved.number):
            fitted = list(self._fitted_projections(unsolved, units))
            tensors |= output_tensors(units, [it.weight_CK for it in fitted])
            fits[units.kind] = fit_of_all(fitted)
        self._fitted.write(unsolved.number, tensors, fits)

    def _fitted_projections(self, unsolved: _Unsolved, units: Units) -> Iterator[FittedProjection]:
        """Fit the output projection of each expert, or the single one."""
        device, number, solved = self._world.device, unsolved.number, solve_expert if units.experts > 1 else solve
        width = units.counts[number] // units.experts
        for expert, kept_U in enumerate(self._kept.of_layer(number, units.kind).chunk(units.experts)):
            channels_K = entries_of(kept_U - width * expert, units.channels_per_unit).to(device)
            weight_CD, grams = unsolved.weights[units.kind][expert], unsolved.grams[units.kind][expert]
            with explaining(number):
                solution = solved(weight_CD.to(device), grams.to(device), channels_K)
            weight_CK = self._fitted.rounded_output(number, units, expert, solution.whole_CK)
            yield FittedProjection(weight_CK, solution.fit, solution.energy)
