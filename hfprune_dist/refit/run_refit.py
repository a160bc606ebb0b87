"""Refits of a pruned model, layer after layer, on calibration windows; a later attempt goes on at its layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.exact_sums import ExactOverflowError
from hfprune_dist.core.gauss_newton import Biases, MlpWeights
from hfprune_dist.core.least_squares import LeastSquares, best_ridge, vectors_of_targets, weight_of_targets
from hfprune_dist.core.selection import entries_of
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.distributed.layer_stream import Grams, LayerStream, MlpIO, unusable
from hfprune_dist.distributed.turns import Turns
from hfprune_dist.distributed.world import World
from hfprune_dist.models.single_layer import mlp_of, output_of, projection, put_weights, weights_kept
from hfprune_dist.refit.gauss_newton_ranks import Reconstruction, Start
from hfprune_dist.refit.refitted_layers import LayerFit, RefittedLayers

# Called on every rank with the number of layers that are done.
AfterEach = Callable[[int], None]
# A layer's number, its output projection's weight, and Gram matrices of what that reads.
Unsolved = tuple[int, Tensor, Grams]
# How far a pursuing layer makes up for earlier ones. What those lost is hardly a function of what this one reads: going
# all the way fits the calibration windows rather than the model.
SHARE_MADE_UP = 0.5


class DenseRefit:
    """Output projections that make their dense outputs of the kept channels of the dense model's activations.

    Args:
        kept: of each layer, ascending indices of the units that stay.
        stream: windows before the first layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: Sequence[Tensor],
        stream: LayerStream,
        fitted: RefittedLayers,
        world: World,
    ) -> None:
        self._checkpoint = checkpoint
        self._kept = kept
        self._stream = stream
        self._fitted = fitted
        self._world = world

    def run(self, after_each: AfterEach) -> None:
        """Refit all layers that are not done; where it is interrupted, ranks first solve what waits.

        Raises:
            UserError: as ``LayerStream.grams`` does.
        """
        done = self._world.broadcast(self._fitted.done() if self._world.is_first else set())
        left = [number for number in range(self._checkpoint.num_layers) if number not in done]
        turns = Turns(left, self._world, self._solve)
        try:
            for number in range(left[-1] + 1 if left else 0):
                layer = self._stream.layer(number)
                if number in done:
                    self._stream.advance(layer)
                else:
                    turns.add(number, self._prepared(number, layer, turns.is_mine(number)))
                after_each(number + 1)
        except Interrupted:
            turns.finish()
            raise

    def _prepared(self, number: int, layer: nn.Module, is_mine: bool) -> Unsolved | None:
        """What it takes to solve a layer; layers of dense activations don't wait for each other."""
        grams = self._stream.grams(number, layer)
        weight_CD = output_of(layer, self._checkpoint.units).weight.data
        return (number, weight_CD, grams) if is_mine else None

    def _solve(self, unsolved: Unsolved) -> None:
        number, weight_CD, grams = unsolved
        channels_K = entries_of(self._kept[number], self._checkpoint.units.channels_per_unit)
        solution = solve(weight_CD, grams, channels_K.to(weight_CD.device))
        self._fitted.write(number, [solution.whole_CK], solution.fit)


class SequentialRefit:
    """MLPs that bring the pruned model's hidden states back to the dense one's, layer after layer.

    Each layer is fitted on what the model pruned and refitted so far makes of the windows. Its MLP's target lies
    between what the dense model's MLP would put out there, and all that is missing after it to the dense model's hidden
    states, which makes up for earlier layers as well (``SHARE_MADE_UP``).

    Args:
        checkpoint: the model that is pruned.
        kept: of each of its layers, ascending indices of the units that stay; they belong to its MLPs.
        stream: its windows before the first layer.
        dense: the same windows before the first layer of the dense model.
        fitted: where layers are written.
        whole_mlp: whether steps of Gauss-Newton on all three projections follow least squares on the down projection.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: Sequence[Tensor],
        stream: LayerStream,
        dense: LayerStream,
        fitted: RefittedLayers,
        *,
        whole_mlp: bool,
        world: World,
    ) -> None:
        self._checkpoint = checkpoint
        self._family = checkpoint.family
        self._units = checkpoint.units
        self._kept = kept
        self._stream = stream
        self._dense = dense
        self._whole_mlp = whole_mlp
        self._fitted = fitted
        self._world = world

    def run(self, after_each: AfterEach) -> None:
        """Refit all layers that are not done.

        Raises:
            UserError: where a layer of the dense model is not its residual stream plus its MLP.
        """
        done = self._world.broadcast(self._fitted.done() if self._world.is_first else set())
        for number in range(self._checkpoint.num_layers):
            dense_layer, layer = self._dense.layer(number), self._stream.layer(number)
            self._dense.require_residual_mlp(dense_layer)
            self._dense.advance(dense_layer)
            put_weights(layer, weights_kept(layer, self._units, self._kept[number]))
            if number not in done:
                self._fit(number, layer, mlp_of(dense_layer))
            self._fitted.install(number, layer)
            self._stream.advance(layer)
            after_each(number + 1)

    def _fit(self, number: int, layer: nn.Module, dense_mlp: nn.Module) -> None:
        """Every rank has the Gram matrices and solves; rank 0 writes."""
        down_CK = output_of(layer, self._units).weight.data
        seen: dict[int, tuple[Tensor, Tensor]] = {}
        grams = self._stream.grams_of(number, sum(down_CK.shape), self._vectors(layer, dense_mlp, seen))
        kept = torch.arange(down_CK.shape[1], device=down_CK.device)
        solution = solve(weight_of_targets(down_CK), grams, kept)
        del grams  # of which the solution has what a step needs
        tensors: Sequence[Tensor] = [solution.whole_CK]
        if self._whole_mlp:
            tensors = self._moved(number, mlp_of(layer), solution, seen).tensors()
        if self._world.is_first:
            self._fitted.write(number, tensors, solution.fit)
        self._world.barrier()

    def _vectors(
        self, layer: nn.Module, dense_mlp: nn.Module, seen: dict[int, tuple[Tensor, Tensor]]
    ) -> Iterator[tuple[int, Tensor]]:
        """What least squares sums, of every micro-batch of this rank.

        ``seen`` gets what a step needs again: what the MLP reads, and its target.
        """
        down = output_of(layer, self._units)
        for index, around in self._stream.around_mlp(layer):
            target_NC = self._target(index, around, dense_mlp)
            if down.bias is not None:
                target_NC -= down.bias.float()
            if self._whole_mlp:
                seen[index] = around.input_NC.cpu(), target_NC.cpu()
            yield index, vectors_of_targets(down.weight.data, around.hidden_NK, target_NC)

    @torch.no_grad()
    def _target(self, index: int, around: MlpIO, dense_mlp: nn.Module) -> Tensor:
        """What the MLP should put out, float32 [tokens, hidden_size]."""
        own_NC: Tensor = dense_mlp(around.input_NC).float()
        missing_NC = self._dense.hidden(index).flatten(0, 1).to(own_NC) - around.residual_NC.float()
        return own_NC.lerp(missing_NC, SHARE_MADE_UP)

    def _moved(
        self,
        number: int,
        mlp: nn.Module,
        solution: Solution,
        seen: Mapping[int, tuple[Tensor, Tensor]],
    ) -> MlpWeights:
        """Gate, up and down after steps, the first from a down projection of least squares on the same windows."""
        gate, up = (projection(mlp, name) for name in self._family.row_projections)
        reconstruction = Reconstruction(
            gate.weight.dtype,
            Biases(*(None if linear.bias is None else linear.bias.data for linear in (gate, up))),
            {index: input_NC for index, (input_NC, _) in seen.items()},
            lambda index: seen[index][1].to(self._world.device),
            micro_batches=self._stream.micro_batches,
            world=self._world,
        )

        gate_KC, up_KC = (linear.weight.data.float() for linear in (gate, up))
        # Held-out windows judge a step, so one begins where they are unknown.
        fitted_weights, whole_weights = (
            MlpWeights(gate_KC, up_KC, down_CK) for down_CK in (solution.fitted_CK, solution.whole_CK)
        )
        try:
            return reconstruction.improve(
                Start(fitted_weights, solution.fitted_KK, self._stream.fitted_tokens),
                Start(whole_weights, solution.whole_KK, self._stream.tokens),
            )
        except ExactOverflowError as error:
            raise unusable(number, error) from None


@dataclass(frozen=True)
class Solution:
    """Down projections by least squares, float32 [hidden_size, kept]; and the float64 mean of h h^T [kept, kept].

    Attributes:
        fitted_CK, fitted_KK: on the windows that are not held out.
        whole_CK, whole_KK: on all windows.
    """

    fit: LayerFit
    fitted_CK: Tensor
    fitted_KK: Tensor
    whole_CK: Tensor
    whole_KK: Tensor


def solve(weight_CD: Tensor, grams: Grams, kept: Tensor) -> Solution:
    """Least squares with the ridge that held-out windows choose."""
    fitted, held_out = (LeastSquares(weight_CD, gram_DD, kept) for gram_DD in (grams.fitted_DD, grams.held_out_DD))
    ridge, fitted_CK = best_ridge(fitted, held_out)
    whole = fitted.mixed(held_out, grams.held_out_share)
    del held_out
    whole_CK = whole.weight(ridge)
    return Solution(
        LayerFit(ridge, error_before=whole.error(whole.old_CK), error_after=whole.error(whole_CK)),
        fitted_CK.float(),
        fitted.gram_KK,
        whole_CK.float(),
        whole.gram_KK,
    )
