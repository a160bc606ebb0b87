"""Refits layer by layer, each on what the model, as pruned and refitted so far, makes of the windows."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.families import Family
from hfprune_dist.core.gauss_newton import Biases, MlpWeights
from hfprune_dist.core.least_squares import vectors_of_targets, weight_of_targets
from hfprune_dist.distributed.host_transfers import HostTransfers
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream
from hfprune_dist.distributed.layer_work import unfinished, up_to_last
from hfprune_dist.distributed.sums import Grams, GramSums, explaining
from hfprune_dist.distributed.world import World
from hfprune_dist.models.single_layer import (
    before_down,
    input_of,
    mlp_of,
    norm_before,
    output_for_update,
    output_of,
    put_weights,
    reads_alike,
    residual_update,
    run,
    weights_kept,
)
from hfprune_dist.refit.gauss_newton_ranks import Reconstruction, Start
from hfprune_dist.refit.least_squares_fit import ProjectionFit, Solution, solve_on_rank0
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units

# Share of what earlier blocks have lost that a block makes up for. That loss is hardly a function of what this block
# reads, so making up for all of it would fit the calibration windows rather than the model.
SHARE_MADE_UP = 0.5
# Layers with their numbers, in order.
Layers = Iterator[tuple[int, nn.Module]]


@dataclass(frozen=True)
class _Block:
    """A block of a layer that is fitted: its attention or its MLP.

    Attributes:
        units: the units that are pruned in it.
        dense: the dense model's layer that has this block.
        gap: the layers that are removed right after this one; the last block before them makes up for them.
        wanted: micro-batch -> the dense model's residual stream after the block, or after the gap, on the CPU.
    """

    units: Units
    dense: nn.Module
    wanted: Mapping[int, Tensor]
    gap: Sequence[nn.Module] = ()


class SequentialRefit:
    """Fits blocks that bring the pruned model's residual stream back to the dense one's, layer by layer.

    A block's target lies between two outputs: that of the dense model's block for the same input, and the one that
    would turn the residual stream into the dense model's, which makes up for earlier blocks too (``SHARE_MADE_UP``).

    Args:
        family: of the model that is pruned.
        kept: what stays of that model.
        stream: the pruned model's windows before the first layer.
        dense: the same windows before the first layer of the dense model.
        fitted: where refitted layers are written. Its kinds say which blocks are fitted; if it holds whole MLPs, Gauss-
            Newton steps on all their projections follow least squares on the down projection.
        more_iterations: of the Gauss-Newton step on all windows.
    """

    def __init__(
        self,
        family: Family,
        kept: Kept,
        stream: LayerStream,
        dense: LayerStream,
        fitted: RefittedLayers,
        *,
        more_iterations: int,
        world: World,
    ) -> None:
        self._family = family
        self._mlp, *self._attention = fitted.kinds
        self._kept = kept
        self._stream = stream
        self._dense = dense
        self._fitted = fitted
        self._more_iterations = more_iterations
        self._transfers = HostTransfers(world.device)
        self._world = world

    def run(self, after_each: AfterLayer) -> None:
        """Refit all layers that stay and are not done yet; windows go no further than the last of these.

        Raises:
            UserError: if a layer of the dense model is not its residual stream plus its blocks; or as ``explaining``
                and ``RefittedLayers.rounded`` do.
        """
        left = unfinished(self._kept.layers, self._fitted.done, self._world)
        staying = [number for number in self._kept.layers if number in up_to_last(left)]
        dense_layers = self._dense.layers(range(self._next_place(staying[-1]) if staying else 0))
        place = 0
        for number, layer in self._stream.layers(staying):
            for _ in range(place, number):  # before the first that stays
                self._dense.advance(next(dense_layers)[1])
            place = self._next_place(number)
            self._through(number, layer, dense_layers, is_done=number not in left)
            del layer
            after_each(number + 1)

    def _next_place(self, number: int) -> int:
        """Number of the next layer that stays; the number of layers if there is none."""
        return min((it for it in self._kept.layers if it > number), default=self._dense.num_layers)

    def _through(self, number: int, layer: nn.Module, dense_layers: Layers, *, is_done: bool) -> None:
        """Take the windows of both models through a layer, and the dense model's through the gap after it."""
        blocks = self._advance_dense(number, dense_layers)
        for units in (*self._attention, self._mlp):
            put_weights(layer, weights_kept(layer, units, self._kept.of_layer(number, units.kind)))
        if is_done:
            self._fitted.install(number, layer)
            self._stream.advance_to(layer, self._mlp)
        else:
            self._fit(number, layer, blocks)
            self._fitted.install(number, layer)
        self._stream.advance_from(layer, self._mlp)

    def _advance_dense(self, number: int, dense_layers: Layers) -> list[_Block]:
        """Take the dense model's windows through a layer and the gap after it, and return what its blocks are fitted
        to, the MLP's at the end.
        """
        _, layer = next(dense_layers)
        self._dense.require_residual(layer, [*self._attention, self._mlp])
        self._dense.advance_to(layer, self._mlp)
        blocks = [_Block(units, layer, self._dense.all_hidden()) for units in self._attention]
        self._dense.advance_from(layer, self._mlp)
        gap = [next(dense_layers)[1] for _ in range(number + 1, self._next_place(number))]
        for gone in gap:
            self._dense.advance(gone)
        return [*blocks, _Block(self._mlp, layer, self._dense.all_hidden(), gap)]

    def _fit(self, number: int, layer: nn.Module, blocks: list[_Block]) -> None:
        """Fit a layer's blocks; leaves the windows before the MLP. Every rank has the Gram matrices, and rank 0 writes.

        Args:
            blocks: emptied on the way, since what they are fitted to is as large as the windows.
        """
        tensors: dict[str, Tensor] = {}
        fits: dict[str, ProjectionFit] = {}
        for units in self._attention:
            solution, _ = self._solved(number, layer, blocks.pop(0))
            fitted = {f"{units.output}.weight": solution.whole_CK}
            self._put(number, layer, fitted)
            tensors |= fitted
            fits[units.kind] = solution.fit
        self._stream.advance_to(layer, self._mlp)
        targets: dict[int, Tensor] = {}
        solution, grams = self._solved(number, layer, blocks.pop(), targets if self._fitted.whole_mlp else None)
        fits[self._mlp.kind] = solution.fit
        if self._fitted.whole_mlp:
            tensors |= self._moved(number, layer, solution, grams, targets)
        else:
            tensors[f"{self._mlp.output}.weight"] = solution.whole_CK
        self._world.on_rank0(lambda: self._fitted.write(number, tensors, fits))

    def _put(self, number: int, layer: nn.Module, fitted: Mapping[str, Tensor]) -> None:
        """Give the layer a fitted block, rounded as rank 0 will save it; every rank has the same bits to round."""
        like = output_of(layer, self._mlp).weight
        put_weights(layer, {name: it.to(like) for name, it in self._fitted.rounded(number, fitted).items()})

    def _solved(
        self, number: int, layer: nn.Module, block: _Block, targets: dict[int, Tensor] | None = None
    ) -> tuple[Solution, Grams]:
        """Fit an output projection by least squares; and the Gram matrices of its channels, followed by its targets.

        Args:
            targets: is given the targets of every micro-batch of this rank, on the CPU.
        """
        weight_CK = output_of(layer, block.units).weight.data
        sums = GramSums(number, sum(weight_CK.shape), self._stream.split, self._world)
        fitted_to = self._summed(layer, block, sums)
        if targets is None:  # only the sums are needed
            collections.deque(fitted_to, maxlen=0)
        else:
            targets.update(self._transfers.to_host(fitted_to))
        grams = sums.means()
        kept = torch.arange(weight_CK.shape[1], device=weight_CK.device)
        with explaining(number):
            return solve_on_rank0(weight_of_targets(weight_CK), grams, kept, self._world), grams

    def _summed(self, layer: nn.Module, block: _Block, sums: GramSums) -> Iterator[tuple[int, Tensor]]:
        """Yield the targets of every micro-batch of this rank, once its terms for least squares have been added up."""
        output, is_mlp = output_of(layer, block.units), block.units is self._mlp
        is_whole = not is_mlp and reads_alike(layer, block.dense, block.units)
        wanted = self._transfers.to_device((index, block.wanted[index]) for index in self._stream.all_hidden())
        for index, residual_BTC in self._stream.standing():
            dense_ND = None if is_mlp else self._hidden(block.dense, block, residual_BTC)
            target_NC = self._target(layer, residual_BTC, block, next(wanted)[1], dense_ND)
            if output.bias is not None:
                target_NC -= output.bias.float()
            hidden_NK = dense_ND if is_whole else None
            del dense_ND  # before another is made
            if hidden_NK is None:
                hidden_NK = self._hidden(layer, block, residual_BTC)
            sums.add(index, vectors_of_targets(output.weight.data, hidden_NK, target_NC))
            del hidden_NK, residual_BTC
            yield index, target_NC
            del target_NC  # before the next one is made

    @torch.no_grad()
    def _hidden(self, layer: nn.Module, block: _Block, residual_BTC: Tensor) -> Tensor:
        """What a block's output projection reads [tokens, channels]."""
        compute = partial(run, layer, residual_BTC)
        if block.units is self._mlp:
            compute = partial(mlp_of(layer, self._mlp), norm_before(layer, self._mlp)(residual_BTC))
        return input_of(output_of(layer, block.units), compute).flatten(0, 1)

    @torch.no_grad()
    def _target(
        self, layer: nn.Module, residual_BTC: Tensor, block: _Block, wanted_BTC: Tensor, dense_ND: Tensor | None
    ) -> Tensor:
        """What a block should put out, float32 [tokens, hidden_size].

        Args:
            dense_ND: what the dense block's output projection reads; None for an MLP.
        """
        if dense_ND is None:
            normed_NC = norm_before(block.dense, self._mlp)(residual_BTC).flatten(0, 1)
            own_NC: Tensor = mlp_of(block.dense, self._mlp)(normed_NC)
        else:
            own_NC = output_of(block.dense, block.units)(dense_ND)
        residual_NC, output_NC = residual_BTC.flatten(0, 1), own_NC
        own_NC = residual_update(block.dense, block.units, own_NC)
        if block.gap:
            reached_BTC = (residual_NC + own_NC).view_as(residual_BTC)
            for gone in block.gap:
                reached_BTC = run(gone, reached_BTC)
            own_NC = reached_BTC.flatten(0, 1).float() - residual_NC.float()
        own_NC = own_NC.float()
        missing_NC = wanted_BTC.flatten(0, 1).to(own_NC) - residual_NC.float()
        return output_for_update(layer, block.units, own_NC.lerp(missing_NC, SHARE_MADE_UP), output_NC)

    def _moved(
        self, number: int, layer: nn.Module, solution: Solution, grams: Grams, targets: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Gate, up and down after Gauss-Newton steps, the first from a least-squares down on the same windows."""
        norm = norm_before(layer, self._mlp)
        mlp = before_down(layer, self._mlp)
        reconstruction = Reconstruction(
            number,
            mlp.dtype,
            Biases(mlp.biases, mlp.activation),
            dict(self._transfers.through(self._stream.all_hidden().items(), lambda it: norm(it).flatten(0, 1))),
            targets,
            micro_batches=self._stream.split.count,
            more_iterations=self._more_iterations,
            world=self._world,
        )

        rows_KC = tuple(weight.float() for weight in mlp.weights)
        kept = solution.whole_CK.shape[1]  # the channels come first
        # Held-out windows judge a step, so the first one begins at weights that haven't seen them.
        fitted, whole = (
            Start(MlpWeights(rows_KC, down_CK), gram_DD[:kept, :kept], tokens)
            for down_CK, gram_DD, tokens in (
                (solution.fitted_CK, grams.fitted_DD, self._stream.split.fitted_tokens),
                (solution.whole_CK, grams.whole(), self._stream.split.tokens),
            )
        )
        with explaining(number):
            moved = reconstruction.improve(fitted, whole)
        rows = moved.rows_KC if self._mlp.row_parts[0] == 1 else [torch.cat(moved.rows_KC)]  # gate and up are one
        return dict(zip(self._mlp.weights, [*rows, moved.down_CK], strict=True))
