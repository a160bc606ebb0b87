"""Least squares on output projections, with a ridge that held-out windows choose; and the refit that does nothing else:
each layer on the dense model's activations, so that none depends on another.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hfprune_dist.core.devices import send
from hfprune_dist.core.gram import UnresolvedError
from hfprune_dist.core.least_squares import RIDGES, LeastSquares, Projection, best_ridge
from hfprune_dist.core.portions import wide_product, widened
from hfprune_dist.core.selection import entries_of
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.sums import Float64Sum, Grams, is_held_out, naming_layer
from hfprune_dist.distributed.world import World
from hfprune_dist.models.experts import output_weights
from hfprune_dist.models.single_layer import run
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units


class Problems(NamedTuple):
    """A problem on the windows that are fitted, and on those that are held out."""

    fitted: LeastSquares
    held_out: LeastSquares

    def whole(self) -> LeastSquares:
        """The problem on all windows."""
        return self.fitted.with_tokens_of(self.held_out)


class TargetSums:
    """The problems of fitting what a projection reads to any targets, added up over micro-batches.

    Args:
        number: of the layer, for messages.
        weight_CK: the projection's current weight [hidden_size, channels].
        micro_batches: their number on all ranks together.
    """

    def __init__(self, number: int, weight_CK: Tensor, micro_batches: int, world: World) -> None:
        channels = weight_CK.shape[1]
        self._sums = [
            [
                Float64Sum(number, [], world),
                Float64Sum(number, weight_CK.shape, world),
                Float64Sum(number, [channels, channels], world, is_gram=True),
            ]
            for _ in range(2)
        ]
        self._old_CK = widened(weight_CK)
        self._micro_batches = micro_batches

    def add(self, index: int, hidden_NK: Tensor, target_NC: Tensor) -> None:
        """Add a micro-batch: what the projection reads, and float32 targets of its outputs."""
        energy, cross, gram = self._sums[is_held_out(index, self._micro_batches)]
        energy.add(target_NC.square().sum(dtype=torch.float64))
        cross.add(wide_product(target_NC, hidden_NK))
        gram.add_gram(hidden_NK)

    def of_all_ranks(self) -> Problems:
        """The sums over all ranks; collective, see ``Float64Sum.of_all_ranks``."""
        totals = Float64Sum.of_all_ranks([each for sums in self._sums for each in sums])
        parts = (totals[:3], totals[3:])
        return Problems(*(LeastSquares(energy, cross, gram, self._old_CK) for energy, cross, gram in parts))


class Solution(NamedTuple):
    """An output projection's new weight [hidden_size, kept], float32.

    Attributes:
        fitted_CK: fitted on the windows that are not held out.
        whole_CK: the same on all windows.
    """

    fitted_CK: Tensor
    whole_CK: Tensor


def solve(problems: Problems, ridges: Sequence[float] = RIDGES, *, scarce: bool = False) -> tuple[Solution, Tensor]:
    """Solve by least squares; a GPU's host doesn't wait.

    Args:
        scarce: whether few tokens, or none, may have reached the projection. If all targets on the fitted or on the
            held-out windows are zero, there is nothing to choose a ridge by; the largest one is used, which pulls
            towards the old weight. If they are zero on both, the old weight stays.

    Returns:
        The solution; and three numbers, float64: its error on held-out windows, its ridge, and 0. It means nothing if
        one is infinite, because a Gram matrix isn't positive definite: that of the fitted windows with any of the
        ridges, or that of all windows with the best one.
    """
    cannot_choose = torch.stack([problem.energy for problem in problems]).amin() <= 0 if scarce else False
    ridge, error, fitted_CK = best_ridge(*problems, ridges, largest=cannot_choose)
    whole_CK, problem = problems.whole().solved(ridge)
    unresolved = torch.zeros_like(error).masked_fill(problem != 0, torch.inf)
    # Without ridges it would be the old weight itself, and another rank's solution would be written there.
    fitted_CK = fitted_CK.clone(memory_format=torch.contiguous_format)
    return Solution(fitted_CK, whole_CK), torch.stack([error, ridge, unresolved])


def solve_together(problems: Problems, world: World) -> Solution:
    """``solve`` with the ridges shared out among all ranks, each of which gets the best solution; collective.

    Raises:
        UnresolvedError: if there is none.
    """
    solution, outcome = solve(problems, RIDGES[world.rank :: world.size])
    outcomes = world.all_gather(tuple(outcome.tolist()))
    best = min(outcomes)
    if not all(map(math.isfinite, best)):
        raise UnresolvedError
    for weight_CK in solution:
        world.broadcast_tensor(weight_CK, outcomes.index(best))
    return solution


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
        UserError: as ``LayerStream.grams``, ``naming_layer`` and ``RefittedLayers.rounded`` do.
    """
    for number, layer, is_left in stream.layers_left(kept.layers, fitted.done, after_each):
        there = [units for units in kinds if units.counts[number]]
        if not is_left:
            stream.advance(partial(run, layer))
        else:
            grams = stream.grams(number, layer, there, owner=0)
            if stream.world.is_first:
                tensors: dict[str, Tensor] = {}
                for units in there:
                    with naming_layer(number):
                        weights = _solved(layer, units, kept.of_layer(number, units.kind), grams.pop(units.kind))
                    tensors |= output_tensors(units, weights)
                fitted.write_rounded(number, tensors)
            del grams
        del layer


def _solved(layer: nn.Module, units: Units, kept_U: Tensor, of_experts: Sequence[Grams]) -> list[Tensor]:
    """Fit the output projection of each expert, or the single one."""
    solved, outcomes = [], []
    for expert, (weight_CD, of_expert) in enumerate(zip(output_weights(layer, units), of_experts, strict=True)):
        first = weight_CD.shape[1] // units.channels_per_unit * expert
        channels_K = entries_of(kept_U.chunk(units.experts)[expert] - first, units.channels_per_unit)
        kept_K, grams = send(channels_K, weight_CD.device), (of_expert.fitted_DD, of_expert.held_out_DD)
        problems = Problems(*(Projection(weight_CD, gram_DD).keeping(kept_K) for gram_DD in grams))
        solution, outcome = solve(problems, scarce=units.experts > 1)
        solved.append(solution.whole_CK)
        outcomes.append(outcome)
    if not torch.stack(outcomes).isfinite().all():  # only now does a GPU's host wait
        raise UnresolvedError
    return solved


def output_tensors(units: Units, weights_CK: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name within a layer -> tensor as stored in files, for the output projections of some units.

    Args:
        weights_CK: the weight of each expert [hidden_size, channels], or a single one.
    """
    name, place, _ = units.owned[-1]
    if "{}" not in name and units.experts > 1:
        whole = torch.stack([*weights_CK])
        return {name: whole if place == 2 else whole.transpose(1, 2)}
    return {name.format(expert): weight_CK for expert, weight_CK in enumerate(weights_CK)}
