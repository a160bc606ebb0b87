"""Refits layer by layer, each on what the model, as pruned and refitted so far, makes of the windows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.core.devices import send, to_host
from hfprune_dist.distributed.layer_check import Departure, refuse_departures
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream, States
from hfprune_dist.distributed.sums import naming_layer
from hfprune_dist.models.single_layer import (
    before_block,
    before_down,
    input_of,
    norm_before,
    output_for_update,
    output_of,
    part_of,
    put_weights,
    residual_update,
    row_matrices,
    run,
    through_mlp,
    weights_kept,
)
from hfprune_dist.refit.gauss_newton_ranks import Reconstruction
from hfprune_dist.refit.output_refit import Problems, Solution, TargetSums, solve_together
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Kept
from hfprune_dist.structures.units import Units

# Share of what earlier blocks have lost that a block makes up for. That loss is hardly a function of what this block
# reads, so making up for all of it would fit the calibration windows rather than the model.
SHARE_MADE_UP = 0.5
# Tokens on which each layer is checked to be its residual stream plus its blocks.
TOKENS_CHECKED = 16
REMEDY = "a method whose refit is dense or none works"


class SequentialRefit:
    """Fits blocks that bring the pruned model's residual stream back to the dense one's, layer by layer.

    A block's target lies between two outputs: that of the dense model's block for the same input, and the one that
    would turn the residual stream into the dense model's, which makes up for earlier blocks too (``SHARE_MADE_UP``).

    Args:
        kept: what stays of the model.
        kinds: the units whose blocks are fitted, those of the MLP first.
        stream, dense: the windows before the first layer of the pruned and of the dense model.
        fitted: where rank 0 writes refitted layers; those that are there stay.
        iterations: if a Gauss-Newton step on all projections of an MLP follows least squares on the down projection,
            its iterations on the windows that are not held out, and on all windows (``Reconstruction.improve``).
    """

    def __init__(
        self,
        kept: Kept,
        kinds: Sequence[Units],
        stream: LayerStream,
        dense: LayerStream,
        fitted: RefittedLayers,
        *,
        iterations: tuple[int, int] | None = None,
    ) -> None:
        self._mlp, *self._attention = kinds
        self._kept = kept
        self._stream = stream
        self._dense = dense
        self._fitted = fitted
        self._iterations = iterations
        self._world = stream.world

    def run(self, after_each: AfterLayer) -> None:
        """Refit all layers that stay and are not done yet; windows go no further than the last of these.

        Raises:
            UserError: if a layer of the dense model is not its residual stream plus its blocks; or as ``naming_layer``
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
    def _departures(self, number: int, layer: nn.Module) -> list[Departure]:
        """How far, on rank 0's first tokens, a layer is from adding its blocks' outputs to its residual stream: far if,
        for example, a norm follows an output projection. The host may read it when it has waited for the GPU.
        """
        found: list[Departure] = []
        if 0 not in self._dense.states:
            return found
        hidden_BTC = send(self._dense.states[0], self._world.device)[:1, :TOKENS_CHECKED]
        kinds, after = [*self._attention, self._mlp], run(layer, hidden_BTC)
        streams = [*(before_block(layer, units, hidden_BTC) for units in kinds), after]
        for place, units in enumerate(kinds):
            output_NC = output_of(layer, units)(self._read(layer, units, streams[place]))
            reached_NC = streams[place].flatten(0, 1) + residual_update(layer, units, output_NC)
            what = (
                f"in layer {number}, the inputs of {units.block.reader} plus the outputs of {units.output} depart from "
                "the hidden states that follow"
            )
            departure = Departure.between(reached_NC, streams[place + 1].flatten(0, 1), what)
            found.append(departure._replace(error=to_host(departure.error)))
        return found

    def _fit(self, number: int, layer: nn.Module, dense_layers: Iterator[nn.Module], dropped_after: int) -> None:
        """Fit a layer's blocks, and take the windows of both models past it; rank 0 writes.

        Args:
            dropped_after: number of layers right after this one that are gone. The dense model's windows go past them,
                too: the MLP makes up for them.
        """
        dense, tensors = next(dense_layers), dict[str, Tensor]()
        departures = self._departures(number, dense)
        self._dense.advance(partial(before_block, dense, self._mlp))
        for units in self._attention:
            read: States = {}
            solution, _ = self._solved(number, layer, units, dense, read=read)
            # As rank 0 will save it; every rank has the same bits to round.
            fitted = self._fitted.rounded(number, {f"{units.output}.weight": solution.whole_CK})
            put_weights(layer, {name: tensor.to(output_of(layer, units).weight) for name, tensor in fitted.items()})
            tensors |= fitted
            for index, residual_BTC in self._stream.standing():
                output_NC = output_of(layer, units)(send(read.pop(index), self._world.device))
                update_BTC = residual_update(layer, units, output_NC).view_as(residual_BTC)
                self._stream.states[index] = self._stream.keep(residual_BTC + update_BTC)
        if not self._attention:
            self._stream.advance(partial(before_block, layer, self._mlp))
        self._dense.advance(partial(through_mlp, dense, self._mlp))
        dropped = [next(dense_layers) for _ in range(dropped_after)]
        for gone in dropped:
            self._dense.advance(partial(run, gone))
        targets: States | None = None if self._iterations is None else {}
        solution, problems = self._solved(number, layer, self._mlp, dense, dropped, targets)
        # The host has waited for the sums of all ranks, so that these are there.
        refuse_departures(departures, self._stream.reader.dtype, REMEDY)
        if targets is None:
            tensors[f"{self._mlp.output}.weight"] = solution.whole_CK
        else:
            tensors |= self._moved(number, layer, solution, problems, targets)
        self._world.on_rank0(lambda: self._fitted.write_rounded(number, tensors))
        self._fitted.install(number, layer)
        self._stream.advance(partial(through_mlp, layer, self._mlp))

    def _solved(
        self,
        number: int,
        layer: nn.Module,
        units: Units,
        dense: nn.Module,
        dropped: Sequence[nn.Module] = (),
        targets: States | None = None,
        read: States | None = None,
    ) -> tuple[Solution, Problems]:
        """Fit an output projection by least squares, so that a block brings the residual stream to that of the dense
        model.

        Args:
            dense: the dense model's layer that has this block.
            dropped: layers between the block and where the dense model's windows are.
            targets, read: are given the targets, and what the projection reads, of every micro-batch of this rank.
        """
        sums = TargetSums(number, output_of(layer, units).weight.data, self._stream.micro_batches, self._world)
        for index, residual_BTC in self._stream.standing():
            wanted_BTC = send(self._dense.states[index], self._world.device)
            read_NK = self._read(layer, units, residual_BTC)
            lost = output_of(layer, units).weight.shape != output_of(dense, units).weight.shape
            dense_ND = self._read(dense, units, residual_BTC) if lost else read_NK
            target_NC = self._target(layer, units, dense, dense_ND, dropped, residual_BTC, wanted_BTC)
            sums.add(index, read_NK, target_NC)
            if read is not None:
                read[index] = self._stream.keep(read_NK)
            if targets is not None:
                targets[index] = self._stream.keep(target_NC)
            del residual_BTC, wanted_BTC, target_NC, read_NK, dense_ND  # before the next ones are made
        problems = sums.of_all_ranks()
        with naming_layer(number):
            return solve_together(problems, self._world), problems

    @torch.no_grad()
    def _read(self, layer: nn.Module, units: Units, residual_BTC: Tensor) -> Tensor:
        """What the output projection of a block reads, given the residual stream before it [tokens, channels]."""
        compute = partial(run, layer, residual_BTC)
        if units is self._mlp:
            compute = partial(part_of(layer, units.block.name), norm_before(layer, units)(residual_BTC))
        return input_of(output_of(layer, units), compute).flatten(0, 1)

    @torch.no_grad()
    def _target(
        self,
        layer: nn.Module,
        units: Units,
        dense: nn.Module,
        dense_ND: Tensor,
        dropped: Sequence[nn.Module],
        residual_BTC: Tensor,
        wanted_BTC: Tensor,
    ) -> Tensor:
        """What a block's output projection should put out, without its bias, float32 [tokens, hidden_size].

        Args:
            dense_ND: what the dense block's output projection reads for this residual stream.
        """
        output_NC = output_of(dense, units)(dense_ND)
        own_NC, residual_NC = residual_update(dense, units, output_NC), residual_BTC.flatten(0, 1)
        if dropped:
            reached_BTC = (residual_NC + own_NC).view_as(residual_BTC)
            for gone in dropped:
                reached_BTC = run(gone, reached_BTC)
            own_NC = reached_BTC.flatten(0, 1).float() - residual_NC.float()
        missing_NC = wanted_BTC.flatten(0, 1).float() - residual_NC.float()
        target_NC = output_for_update(layer, units, own_NC.float().lerp(missing_NC, SHARE_MADE_UP), output_NC)
        bias = output_of(layer, units).bias
        return target_NC if bias is None else target_NC - bias.float()

    def _moved(
        self, number: int, layer: nn.Module, solution: Solution, problems: Problems, targets: Mapping[int, Tensor]
    ) -> dict[str, Tensor]:
        """Gate, up and down after Gauss-Newton steps."""
        norm, rows = norm_before(layer, self._mlp), row_matrices(layer, self._mlp)
        reconstruction = Reconstruction(
            number,
            rows[0].dtype,
            before_down(layer, self._mlp),
            {index: self._stream.keep(norm(hidden_BTC).flatten(0, 1)) for index, hidden_BTC in self._stream.standing()},
            targets,
            micro_batches=self._stream.micro_batches,
            world=self._world,
        )
        rows_KC = tuple(weight.float() for weight in rows)
        assert self._iterations is not None
        with naming_layer(number):
            moved = reconstruction.improve(rows_KC, solution, problems, *self._iterations)
        whole_rows = moved.rows_KC if self._mlp.row_parts[0] == 1 else [torch.cat(moved.rows_KC)]  # gate and up are one
        return dict(zip(self._mlp.weights, [*whole_rows, moved.down_CK], strict=True))
