"""Refits of a pruned model's MLPs, layer after layer, on calibration windows; a later attempt goes on at its layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn

from hfprune_dist.core.reconstruction import Biases, MlpWeights
from hfprune_dist.core.refit import vectors_of_targets, weight_of_targets
from hfprune_dist.models.checkpoint import Checkpoint
from hfprune_dist.models.layers import mlp_of, narrow
from hfprune_dist.parallel.fitted import FittedLayers, LayerFit, solve
from hfprune_dist.parallel.layerwise import AroundMlp, LayerStream
from hfprune_dist.parallel.reconstruct import Reconstruction
from hfprune_dist.parallel.world import World

# Called on every rank with the number of layers that are done.
AfterEach = Callable[[int], None]


class DenseRefit:
    """Down projections that make the dense MLPs' outputs of the kept activations of the dense model.

    Args:
        kept: of each layer, ascending indices of the neurons that stay.
        stream: windows before the first layer.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: Sequence[Tensor],
        stream: LayerStream,
        fitted: FittedLayers,
        world: World,
    ) -> None:
        self._checkpoint = checkpoint
        self._kept = kept
        self._stream = stream
        self._fitted = fitted
        self._world = world
        self._waiting: tuple[int, Callable[[], tuple[LayerFit, Tensor]]] | None = None

    def run(self, after_each: AfterEach) -> None:
        """Refit all layers that are not done."""
        done = self._world.broadcast(self._fitted.count())
        for number in range(self._checkpoint.num_layers):
            layer = self._stream.layer(number)
            if number < done:
                self._stream.advance(layer)
            else:
                self._fit(number, layer)
            after_each(number + 1)

    def _fit(self, number: int, layer: nn.Module) -> None:
        """Layers of dense activations don't wait for each other: every rank solves one, all at the same time."""
        grams = self._stream.grams(number, layer, advance=True)
        if number % self._world.size == self._world.rank:
            down = mlp_of(layer).get_submodule(self._checkpoint.family.down_projection)
            weight_CD = down.get_parameter("weight").data.double()
            self._waiting = number, partial(solve, weight_CD, grams, self._kept[number].to(weight_CD.device))
        if (number + 1) % self._world.size == 0 or number + 1 == self._checkpoint.num_layers:
            if self._waiting is not None:
                mine, solved = self._waiting
                fit, down_CK = solved()
                self._fitted.write(mine, [down_CK], fit)
                self._waiting = None
            self._world.barrier()


class PursuingRefit:
    """MLPs that bring the pruned model's hidden states back to the dense one's, layer after layer.

    Each layer is fitted on what the model pruned and refitted so far makes of the windows. Its MLP's target is all
    that is missing after it to the dense model's hidden states, so it makes up for earlier layers as well.

    Args:
        checkpoint: the model that is pruned.
        kept: of each of its layers, ascending indices of the neurons that stay.
        stream: its windows before the first layer.
        dense: the same windows before the first layer of the dense model.
        rows: whether a step of Gauss-Newton on all three projections follows least squares on the down projection.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: Sequence[Tensor],
        stream: LayerStream,
        dense: LayerStream,
        rows: bool,
        fitted: FittedLayers,
        world: World,
    ) -> None:
        self._checkpoint = checkpoint
        self._family = checkpoint.family
        self._kept = kept
        self._stream = stream
        self._dense = dense
        self._rows = rows
        self._fitted = fitted
        self._world = world

    def run(self, after_each: AfterEach) -> None:
        """Refit all layers that are not done."""
        done = self._world.broadcast(self._fitted.count())
        for number in range(self._checkpoint.num_layers):
            layer = self._stream.layer(number)
            mlp = mlp_of(layer)
            narrow(mlp, self._family, self._kept[number])
            self._dense.advance(self._dense.layer(number))
            if number >= done:
                self._fit(number, layer)
            self._fitted.install(number, mlp)
            self._stream.advance(layer)
            after_each(number + 1)

    def _fit(self, number: int, layer: nn.Module) -> None:
        """Solve on rank 0, and where all of the MLP moves, go on from there with all ranks."""
        mlp = mlp_of(layer)
        inputs, targets = {}, {}
        for index, around in self._stream.around_mlp(layer):
            inputs[index] = around.input_NC.cpu()
            targets[index] = self._target(index, around, mlp)
        fit, down_CK = self._solve(number, mlp, inputs, targets)
        tensors = [down_CK]
        if self._rows:
            tensors = list(self._reconstructed(mlp, down_CK, inputs, targets).tensors())
        if self._world.is_first:
            self._fitted.write(number, tensors, fit)
        self._world.barrier()

    def _target(self, index: int, around: AroundMlp, mlp: nn.Module) -> Tensor:
        """What the products of the down projection should be, float32 [tokens, hidden_size] on the CPU."""
        target_NC = self._dense.hidden(index).flatten(0, 1).float() - around.residual_NC.float().cpu()
        bias_C = self._linear(mlp, self._family.down_projection).bias
        return target_NC if bias_C is None else target_NC - bias_C.float().cpu()

    def _solve(
        self, number: int, mlp: nn.Module, inputs: Mapping[int, Tensor], targets: Mapping[int, Tensor]
    ) -> tuple[LayerFit, Tensor]:
        """Least squares on the down projection; the new weight is float32 [hidden_size, kept] on the CPU."""
        down_CK = self._linear(mlp, self._family.down_projection).weight.data
        hidden_size, width = down_CK.shape
        vectors = (
            (index, vectors_of_targets(down_CK, self._activations(mlp, input_NC), targets[index].to(down_CK.device)))
            for index, input_NC in inputs.items()
        )
        grams = self._stream.grams_of(number, width + hidden_size, vectors)
        if not self._world.is_first:
            return self._world.broadcast((LayerFit(0.0, 0.0, 0.0), torch.empty(0)))
        kept = torch.arange(width, device=grams.whole_DD.device)
        return self._world.broadcast(solve(weight_of_targets(down_CK.double()), grams, kept))

    @torch.no_grad()
    def _activations(self, mlp: nn.Module, input_NC: Tensor) -> Tensor:
        """What the down projection reads [tokens, kept]."""
        read: list[Tensor] = []
        down = self._linear(mlp, self._family.down_projection)
        handle = down.register_forward_pre_hook(lambda _module, inputs: read.append(inputs[0]))
        mlp(input_NC.to(self._world.device))
        handle.remove()
        return read[0]

    def _reconstructed(
        self, mlp: nn.Module, down_CK: Tensor, inputs: Mapping[int, Tensor], targets: Mapping[int, Tensor]
    ) -> MlpWeights:
        """Gate, up and down after a step that starts with ``down_CK``."""
        gate, up = (self._linear(mlp, name) for name in self._family.row_projections)
        gate_KC, up_KC = (linear.weight.data.float() for linear in (gate, up))
        biases = Biases(*(None if linear.bias is None else linear.bias.data for linear in (gate, up)))
        reconstruction = Reconstruction(inputs, targets, self._stream.micro_batches, self._world)
        return reconstruction.improve(MlpWeights(gate_KC, up_KC, down_CK.to(gate_KC)), biases)

    def _linear(self, mlp: nn.Module, name: str) -> nn.Linear:
        return cast("nn.Linear", mlp.get_submodule(name))
