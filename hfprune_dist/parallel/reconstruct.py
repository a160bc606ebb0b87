"""One Gauss-Newton step of a layer's kept neurons towards what their MLP should put out."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from torch.nn.functional import linear, silu

from hfprune_dist.core.exact import ExactSum
from hfprune_dist.core.reconstruction import Biases, Curvature, Linearized, MlpWeights, solve_normal_equations
from hfprune_dist.parallel.layerwise import is_held_out
from hfprune_dist.parallel.world import World

# Of conjugate gradients; each costs about as much as four forwards of the MLP.
ITERATIONS = 4
# Shares of the step that are tried on held-out windows.
STEP_LENGTHS = (1.0, 0.5)


class Reconstruction:
    """Moves a layer's pruned weights; the same bits on any number of ranks.

    Args:
        inputs: micro-batch of this rank -> what the MLP reads there, [tokens, hidden_size] on the CPU.
        target_of: the same -> what it should put out, without the down projection's bias, float32 on the device.
        micro_batches: of all ranks together.
        fitted_tokens: of all ranks together, in micro-batches that are not held out.
    """

    def __init__(
        self,
        inputs: Mapping[int, Tensor],
        target_of: Callable[[int], Tensor],
        micro_batches: int,
        fitted_tokens: int,
        world: World,
    ) -> None:
        self._inputs = inputs
        self._target_of = target_of
        self._micro_batches = micro_batches
        self._fitted_tokens = fitted_tokens
        self._world = world

    def improve(self, start: MlpWeights, biases: Biases, hidden_KK: Tensor) -> MlpWeights | None:
        """The weights after one step; None where no step is better than ``start`` on held-out windows.

        Args:
            start: must not have seen the held-out windows.
            hidden_KK: the mean of h h^T over the fitted tokens, h the activations of ``start``.

        Raises:
            ExactOverflowError: where outputs or targets are NaN, infinite or out of all proportion.
        """
        # Kept over all iterations, three numbers for each token and kept neuron, to save a third of the time.
        around = {
            index: Linearized(start, biases, input_NC.to(self._world.device))
            for index, input_NC in self._inputs.items()
            if not is_held_out(index, self._micro_batches)
        }
        tokens = self._fitted_tokens
        gate_K, up_K, inputs_CC = self._sum(around, lambda at, _index: at.curvature())
        curvature = Curvature(gate_K, up_K, inputs_CC, hidden_KK * tokens, tokens)
        right = self._sum(around, lambda at, index: at.backward(self._target_of(index) - at.output()).tensors())

        def product(change: MlpWeights) -> MlpWeights:
            return MlpWeights(*self._sum(around, lambda at, _index: at.backward(at.forward(change)).tensors()))

        step = solve_normal_equations(product, MlpWeights(*right), curvature, ITERATIONS)
        candidates = [start, *(start.plus(step, length) for length in STEP_LENGTHS)]
        errors = [self._held_out_error(candidate, biases) for candidate in candidates]
        best = errors.index(min(errors))
        return candidates[best] if best else None

    def _sum(
        self, around: Mapping[int, Linearized], term_of: Callable[[Linearized, int], tuple[Tensor, ...]]
    ) -> tuple[Tensor, ...]:
        """Add up the tensors of every fitted micro-batch of all ranks, exactly."""
        own = list(around)
        shapes: list[torch.Size] = []
        first = term_of(around[own[0]], own[0]) if own else None
        maxima: list[float] = []
        if first is not None:
            maxima = [it.abs().max().item() for it in first]
            shapes = [it.shape for it in first]
        maxima, shapes = self._world.broadcast((maxima, shapes))
        sums = [
            ExactSum(maximum, self._micro_batches, shape, self._world.device)
            for maximum, shape in zip(maxima, shapes, strict=True)
        ]
        for index in own:
            term = first if first is not None and index == own[0] else term_of(around[index], index)
            for total, part in zip(sums, term, strict=True):
                total.add(part)
        for total in sums:
            self._world.add_up(total.total)
        return tuple(total.value().float() for total in sums)

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
        return float((self._target_of(index) - output_NC).square().sum(dtype=torch.float64))


def _output(weights: MlpWeights, biases: Biases, input_NC: Tensor) -> Tensor:
    """[tokens, hidden_size], float32, without the down projection's bias."""
    dtype = input_NC.dtype
    gate_NK = linear(input_NC, weights.gate_KC.to(dtype), biases.gate_K)
    hidden_NK = silu(gate_NK) * linear(input_NC, weights.up_KC.to(dtype), biases.up_K)
    return linear(hidden_NK, weights.down_CK.to(dtype)).float()
