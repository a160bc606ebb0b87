"""One Gauss-Newton step of a layer's kept neurons towards the dense MLP, on the windows of all ranks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from hfprune_dist.core.exact import ExactSum
from hfprune_dist.core.reconstruction import Biases, Linearized, MlpWeights, solve_normal_equations
from hfprune_dist.parallel.layerwise import is_held_out
from hfprune_dist.parallel.world import World

# Of conjugate gradients; each costs about as much as four forwards of the MLP.
ITERATIONS = 8
# The curvature J^T J needs fewer tokens than the pull J^T r (Byrd et al. 2011): outputs for each unknown.
CURVATURE_OUTPUTS = 3
# Shares of the step that are tried on held-out windows.
STEP_LENGTHS = (1.0, 0.5)


class Reconstruction:
    """Moves a layer's pruned weights; the same bits on any number of ranks.

    Args:
        dense: weights of the MLP before pruning.
        dense_biases: its biases.
        inputs: micro-batch of this rank -> what the MLP reads there, [tokens, hidden_size] on the CPU.
        micro_batches: of all ranks together.
    """

    def __init__(
        self,
        dense: MlpWeights,
        dense_biases: Biases,
        inputs: Mapping[int, Tensor],
        micro_batches: int,
        world: World,
    ) -> None:
        self._inputs = inputs
        self._micro_batches = micro_batches
        self._world = world
        self._tokens = sum(world.gather(sum(len(input_NC) for input_NC in inputs.values())))
        self._targets = {
            index: _output(dense, dense_biases, input_NC.to(world.device)).cpu() for index, input_NC in inputs.items()
        }

    def improve(self, start: MlpWeights, biases: Biases) -> MlpWeights:
        """The weights after one step; ``start`` itself where no step is better on held-out windows."""
        fitted = [it for it in range(self._micro_batches) if not is_held_out(it, self._micro_batches)]
        sampled = fitted[:: self._stride(start)]
        diagonal = self._mean(sampled, lambda index: self._at(start, biases, index).diagonal())
        right = self._mean(fitted, lambda index: self._pull(start, biases, index))

        def product(change: MlpWeights) -> MlpWeights:
            return self._mean(sampled, lambda index: _bend(self._at(start, biases, index), change))

        step = solve_normal_equations(product, right, diagonal, ITERATIONS)
        candidates = [start, *(start.plus(step, length) for length in STEP_LENGTHS)]
        errors = [self._held_out_error(candidate, biases) for candidate in candidates]
        return candidates[errors.index(min(errors))]

    def _stride(self, weights: MlpWeights) -> int:
        """The curvature is made of one of so many micro-batches."""
        outputs = self._tokens * weights.down_CK.shape[0]
        return max(1, outputs // (CURVATURE_OUTPUTS * sum(it.numel() for it in weights.tensors())))

    def _at(self, weights: MlpWeights, biases: Biases, index: int) -> Linearized:
        return Linearized(weights, biases, self._inputs[index].to(self._world.device))

    def _pull(self, weights: MlpWeights, biases: Biases, index: int) -> MlpWeights:
        at = self._at(weights, biases, index)
        return at.backward(self._targets[index].to(self._world.device) - at.output())

    def _mean(self, indices: Sequence[int], term_of: Callable[[int], MlpWeights]) -> MlpWeights:
        """Average a term over micro-batches of all ranks, exactly."""
        own = [index for index in indices if index in self._inputs]
        shapes: list[torch.Size] = []
        first = term_of(own[0]) if own else None
        maxima = torch.zeros(3, dtype=torch.float64)
        if first is not None:
            maxima = torch.stack([it.abs().max().double().cpu() for it in first.tensors()])
            shapes = [it.shape for it in first.tensors()]
        self._world.broadcast_tensor(maxima, 0)
        shapes = self._world.broadcast(shapes)
        sums = [
            ExactSum(float(maximum), len(indices), shape, self._world.device)
            for maximum, shape in zip(maxima, shapes, strict=True)
        ]
        for index in own:
            term = first if first is not None and index == own[0] else term_of(index)
            for total, part in zip(sums, term.tensors(), strict=True):
                total.add(part)
        for total in sums:
            self._world.add_up(total.total)
        return MlpWeights(*((total.value() / len(indices)).float() for total in sums))

    def _held_out_error(self, weights: MlpWeights, biases: Biases) -> float:
        """Squared error on the held-out windows of all ranks, added in their order."""
        own = {
            index: self._squared_error(weights, biases, index)
            for index in self._inputs
            if is_held_out(index, self._micro_batches) or self._micro_batches == 1
        }
        everywhere = {index: value for share in self._world.gather(own) for index, value in share.items()}
        return sum(everywhere[index] for index in sorted(everywhere))

    def _squared_error(self, weights: MlpWeights, biases: Biases, index: int) -> float:
        output_NC = _output(weights, biases, self._inputs[index].to(self._world.device))
        return float((self._targets[index].to(output_NC) - output_NC).square().sum(dtype=torch.float64))


def _bend(at: Linearized, change: MlpWeights) -> MlpWeights:
    return at.backward(at.forward(change))


def _output(weights: MlpWeights, biases: Biases, input_NC: Tensor) -> Tensor:
    """[tokens, hidden_size], float32, without the down projection's bias."""
    dtype = input_NC.dtype
    gate_NK = linear(input_NC, weights.gate_KC.to(dtype), biases.gate_K)
    hidden_NK = silu(gate_NK) * linear(input_NC, weights.up_KC.to(dtype), biases.up_K)
    return linear(hidden_NK, weights.down_CK.to(dtype)).float()
