"""Refits layer by layer, each on what the model, as pruned and refitted so far, makes of the windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.core.gauss_newton import MlpWeights
from hfprune_dist.core.least_squares import vectors_of_targets, weight_of_targets
from hfprune_dist.distributed.layer_check import TOLERANCES, refuse_departure, relative_error
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.main_memory import States, to_device, to_host
from hfprune_dist.distributed.sums import Grams, GramSums, explaining
from hfprune_dist.models.single_layer import (
    before_block,
    before_down,
    input_of,
    mlp_of,
    norm_before,
    output_for_update,
    output_of,
    put_weights,
    residual_update,
    row_matrices,
    run,
    through_mlp,
    weights_kept,
)
from hfprune_dist.refit.gauss_newton_ranks import Reconstruction, Start
from hfprune_dist.refit.least_squares_fit import Solution, solve_on_rank0
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units

# Share of what earlier blocks have lost that a block makes up for. That loss is hardly a function of what this block
# reads, so making up for all of it would fit the calibration windows rather than the model.
SHARE_MADE_UP = 0.5


class SequentialRefit:
    """Fits blocks that bring the pruned model's residual stream back to the dense one's, layer by layer.

    A block's target lies between two outputs: that of the dense model's block for the same input, and the one that
    would turn the residual stream into the dense model's, which makes up for earlier blocks too (``SHARE_MADE_UP``).

    Args:
        kept: what stays of the model.
        kinds: the units whose blocks are fitted, those of the MLP first.
        stream, dense: the windows before the first layer of the pruned and of the dense model.
        fitted: where rank 0 writes refitted layers; those that are there stay.
        more_iterations: if Gauss-Newton steps on all projections of an MLP follow least squares on the down projection,
            iterations of the one on all windows.
    """

    def __init__(
        self,
        kept: Kept,
        kinds: Sequence[Units],
        stream: LayerStream,
        dense: LayerStream,
        fitted: RefittedLayers,
        *,
        more_iterations: int | None = None,
    ) -> None:
        self._mlp, *self._attention = kinds
        self._kept = kept
        self._stream = stream
        self._dense = dense
        self._fitted = fitted
        self._more_iterations = more_iterations
        self._world = stream.world

    def run(self, after_each: AfterLayer) -> None:
        """Refit all layers that stay and are not done yet; windows go no further than the last of these.

        Raises:
            UserError: if a layer of the dense model is not its residual stream plus its blocks; or as ``explaining``
                and ``RefittedLayers.rounded`` do.
        """
        finished, layers = self._world.on_rank0(self._fitted.done), self._kept.layers
        last = max((number for number in layers if number not in finished), default=-1)
        ends = dict(zip(layers, [*layers[1:], self._dense.num_layers], strict=True))
        dense_layers = (layer for _, layer in self._dense.reader.layers(range(ends.get(last, 0))))
        if last >= 0:
            self._advance_dense(dense_layers, layers[0])
        for number, layer in self._stream.reader.layers(number for number in layers if number <= last):
            for units in (self._mlp, *self._attention):
                put_weights(layer, weights_kept(layer, units, self._kept.of_layer(number, units.kind)))
            if number in finished:
                self._fitted.install(number, layer)
                self._stream.advance(partial(run, layer))
                self._advance_dense(dense_layers, ends[number] - number)
            else:
                self._fit(number, layer, dense_layers, ends[number] - number - 1)
            del layer
            after_each(number + 1)

    def _advance_dense(self, layers: Iterator[nn.Module], count: int) -> None:
        for _ in range(count):
            self._dense.advance(partial(run, next(layers)))

    @torch.no_grad()
    def _require_residual(self, number: int, layer: nn.Module) -> None:
        """Check, on rank 0's first window, that a layer adds its blocks' outputs to its residual stream as expected.

        Raises:
            UserError: if a block does not, e.g. because a norm follows its output projection.
        """
        if 0 not in self._dense.states:
            return
        hidden_BTC = to_device(self._dense.states[0][:1], self._world.device)
        kinds, after = [*self._attention, self._mlp], run(layer, hidden_BTC)
        streams = [*(before_block(layer, units, hidden_BTC) for units in kinds), after]
        for place, units in enumerate(kinds):
            output_NC = output_of(layer, units)(self._read(layer, units, streams[place]))
            found_NC = streams[place].flatten(0, 1) + residual_update(layer, units, output_NC)
            what = (
                f"in layer {number}, the inputs of {units.block.reader} plus the outputs of {units.output} depart from "
                "the hidden states that follow"
            )
            error = relative_error(found_NC.double(), streams[place + 1].flatten(0, 1).double())
            refuse_departure(error, TOLERANCES[after.dtype], what, "a method whose refit is dense or none works")

    def _fit(self, number: int, layer: nn.Module, dense_layers: Iterator[nn.Module], gap: int) -> None:
        """Fit a layer's blocks, and take the windows of both models past it, and the dense model's past the gap after
        it, for which its last block makes up. Every rank has the Gram matrices, and rank 0 writes.

        Args:
            gap: number of layers that are removed right after this one.
        """
        dense, tensors = next(dense_layers), dict[str, Tensor]()
        self._require_residual(number, dense)
        self._dense.advance(partial(before_block, dense, self._mlp))
        for units in self._attention:
            solution, _ = self._solved(number, layer, units, dense)
            fitted = {f"{units.output}.weight": solution.whole_CK}
            # As rank 0 will save it; every rank has the same bits to round.
            like = output_of(layer, units).weight
            put_weights(layer, {name: it.to(like) for name, it in self._fitted.rounded(number, fitted).items()})
            tensors |= fitted
        self._dense.advance(partial(through_mlp, dense, self._mlp))
        gone = [next(dense_layers) for _ in range(gap)]
        for it in gone:
            self._dense.advance(partial(run, it))
        self._stream.advance(partial(before_block, layer, self._mlp))
        targets: States | None = None if self._more_iterations is None else {}
        solution, grams = self._solved(number, layer, self._mlp, dense, gone, targets)
        if targets is None:
            tensors[f"{self._mlp.output}.weight"] = solution.whole_CK
        else:
            tensors |= self._moved(number, layer, solution, grams, targets)
        self._world.on_rank0(lambda: self._fitted.write_rounded(number, tensors))
        self._fitted.install(number, layer)
        self._stream.advance(partial(through_mlp, layer, self._mlp))

    def _solved(
        self,
        number: int,
        layer: nn.Module,
        units: Units,
        dense: nn.Module,
        gone: Sequence[nn.Module] = (),
        targets: States | None = None,
    ) -> tuple[Solution, Grams]:
        """Fit an output projection by least squares, so that a block brings the residual stream to that of the dense
        model; and the Gram matrices of its channels, followed by its targets.

        Args:
            dense: the dense model's layer that has this block.
            gone: removed layers between the block and where the dense model's windows are.
            targets: is given the targets of every micro-batch of this rank.
        """
        weight_CK = output_of(layer, units).weight.data
        sums = GramSums(number, sum(weight_CK.shape), self._stream.micro_batches, self._world)
        for index, residual_BTC in self._stream.standing():
            wanted_BTC = to_device(self._dense.states[index], self._world.device)
            target_NC = self._target(layer, units, dense, gone, residual_BTC, wanted_BTC)
            hidden_NK = self._read(layer, units, residual_BTC)
            del residual_BTC, wanted_BTC
            sums.add(index, vectors_of_targets(weight_CK, hidden_NK, target_NC))
            if targets is not None:
                targets[index] = to_host(target_NC)
            del hidden_NK, target_NC  # before the next ones are made
        grams, kept = sums.of_all_ranks(), torch.arange(weight_CK.shape[1], device=weight_CK.device)
        with explaining(number):
            return solve_on_rank0(weight_of_targets(weight_CK), grams, kept, self._world), grams

    @torch.no_grad()
    def _read(self, layer: nn.Module, units: Units, residual_BTC: Tensor) -> Tensor:
        """What the output projection of a block reads, given the residual stream before it [tokens, channels]."""
        compute = partial(run, layer, residual_BTC)
        if units is self._mlp:
            compute = partial(mlp_of(layer, units), norm_before(layer, units)(residual_BTC))
        return input_of(output_of(layer, units), compute).flatten(0, 1)

    @torch.no_grad()
    def _target(
        self,
        layer: nn.Module,
        units: Units,
        dense: nn.Module,
        gone: Sequence[nn.Module],
        residual_BTC: Tensor,
        wanted_BTC: Tensor,
    ) -> Tensor:
        """What a block's output projection should put out, without its bias, float32 [tokens, hidden_size]."""
        output_NC = output_of(dense, units)(self._read(dense, units, residual_BTC))
        own_NC, residual_NC = residual_update(dense, units, output_NC), residual_BTC.flatten(0, 1)
        if gone:
            reached_BTC = (residual_NC + own_NC).view_as(residual_BTC)
            for it in gone:
                reached_BTC = run(it, reached_BTC)
            own_NC = reached_BTC.flatten(0, 1).float() - residual_NC.float()
        missing_NC = wanted_BTC.flatten(0, 1).float() - residual_NC.float()
        target_NC = output_for_update(layer, units, own_NC.float().lerp(missing_NC, SHARE_MADE_UP), output_NC)
        bias = output_of(layer, units).bias
        return target_NC if bias is None else target_NC - bias.float()

    def _moved(
        self, number: int, layer: nn.Module, solution: Solution, grams: Grams, targets: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Gate, up and down after Gauss-Newton steps, the first from a least-squares down on the same windows."""
        norm, rows = norm_before(layer, self._mlp), row_matrices(layer, self._mlp)
        reconstruction = Reconstruction(
            number,
            rows[0].dtype,
            before_down(layer, self._mlp),
            {index: to_host(norm(hidden_BTC).flatten(0, 1)) for index, hidden_BTC in self._stream.standing()},
            targets,
            micro_batches=self._stream.micro_batches,
            world=self._world,
        )
        rows_KC, kept = tuple(weight.float() for weight in rows), solution.whole_CK.shape[1]
        # Held-out windows judge a step, so the first one begins at weights that haven't seen them. The channels come
        # first in the Gram matrices.
        fitted = Start(MlpWeights(rows_KC, solution.fitted_CK), grams.fitted_DD[:kept, :kept])
        whole = Start(MlpWeights(rows_KC, solution.whole_CK), grams.whole()[:kept, :kept])
        assert self._more_iterations is not None
        with explaining(number):
            moved = reconstruction.improve(fitted, whole, self._more_iterations)
        whole_rows = moved.rows_KC if self._mlp.row_parts[0] == 1 else [torch.cat(moved.rows_KC)]  # gate and up are one
        return dict(zip(self._mlp.weights, [*whole_rows, moved.down_CK], strict=True))
