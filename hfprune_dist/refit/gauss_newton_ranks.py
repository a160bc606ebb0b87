"""Gauss-Newton steps on the kept neurons of a layer, computed by all ranks together."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfprune_dist.core.exact_sums import ExactSum
from hfprune_dist.core.gauss_newton import Biases, GaussNewtonSums, Linearized, MlpWeights, solve_normal_equations
from hfprune_dist.core.memory_limits import KEPT_BYTES
from hfprune_dist.distributed.gram_sums import is_held_out
from hfprune_dist.distributed.world import World

# Of conjugate gradients, in a step and in the one that follows on all windows; each costs about as much as four
# forwards of the MLP.
ITERATIONS, MORE_ITERATIONS = 4, 2
# Shares of the step that are tried on held-out windows.
STEP_LENGTHS = (0.0, 1.0, 0.5)


@dataclass(frozen=True)
class Start:
    """Where a step begins.

    Attributes:
        weights: of the MLP.
        hidden_KK: the mean of h h^T over the tokens that the step is fitted on, h the activations [kept, kept]; those
            of a step before will do, since it only guides the iterations.
        tokens: how many these are, on all ranks together.
    """

    weights: MlpWeights
    hidden_KK: Tensor
    tokens: int


class Reconstruction:
    """Moves a layer's pruned weights; the same bits on any number of ranks.

    Args:
        dtype: of products.
        biases: of gate and up, in that dtype.
        inputs: micro-batch of this rank -> what the MLP reads there, in that dtype [tokens, hidden_size] on the CPU.
        target_of: the same -> what it should put out, without the down projection's bias, float32 on the device.
        micro_batches: of all ranks together.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        biases: Biases,
        inputs: Mapping[int, Tensor],
        target_of: Callable[[int], Tensor],
        *,
        micro_batches: int,
        world: World,
    ) -> None:
        self._dtype = dtype
        self._biases = biases
        self._inputs = inputs
        self._target_of = target_of
        self._micro_batches = micro_batches
        self._world = world

    def improve(self, fitted: Start, whole: Start) -> MlpWeights:
        """Weights after a step that held-out windows, which it doesn't know, find better; and another on all windows.

        Those windows also decide how far both go.

        Args:
            fitted: where the first begins, on the windows that are not held out.
            whole: the same for all windows; its weights are the result where no step is better.

        Raises:
            ExactOverflowError: where outputs or targets are NaN, infinite or out of all proportion.
        """
        known = [index for index in self._inputs if not is_held_out(index, self._micro_batches)]
        step = self._step(fitted, known, ITERATIONS)
        errors = [self._held_out_error(fitted.weights.plus(step, length)) for length in STEP_LENGTHS]
        length = STEP_LENGTHS[errors.index(min(errors))]
        if not length:
            return whole.weights
        moved = replace(whole, weights=fitted.weights.plus(step, length))
        return moved.weights.plus(self._step(moved, list(self._inputs), MORE_ITERATIONS), length)

    def _step(self, start: Start, indices: Sequence[int], iterations: int) -> MlpWeights:
        """Of Gauss-Newton, on some micro-batches of this rank and those of the others."""
        around = self._around(start.weights, indices)
        gate_K, up_K, inputs_CC = self._sum(indices, lambda index: around(index).curvature())
        curvature = GaussNewtonSums(gate_K, up_K, inputs_CC, start.hidden_KK * start.tokens, start.tokens)

        def residual(index: int) -> MlpWeights:
            at = around(index)
            return at.backward(self._target_of(index) - at.output())

        def bent(index: int, change: MlpWeights) -> MlpWeights:
            at = around(index)
            return at.backward(at.forward(change))

        def product(change: MlpWeights) -> MlpWeights:
            rounded = change.to(self._dtype)
            return MlpWeights(*self._sum(indices, lambda index: bent(index, rounded).tensors()))

        right = MlpWeights(*self._sum(indices, lambda index: residual(index).tensors()))
        return solve_normal_equations(product, right, curvature, iterations)

    def _around(self, weights: MlpWeights, indices: Sequence[int]) -> Callable[[int], Linearized]:
        """The MLP around some weights on a micro-batch.

        Kept for all iterations where that fits, which saves a third of their time, else made anew.
        """
        rounded = weights.to(self._dtype)
        kept: dict[int, Linearized] = {}
        left = KEPT_BYTES
        for index in indices:
            left -= Linearized.bytes_of(weights, self._inputs[index])
            if left >= 0:
                kept[index] = self._linearized(rounded, index)
        return lambda index: kept[index] if index in kept else self._linearized(rounded, index)

    def _linearized(self, weights: MlpWeights, index: int) -> Linearized:
        return Linearized(weights, self._biases, self._inputs[index].to(self._world.device))

    def _sum(self, indices: Sequence[int], term_of: Callable[[int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Add up the tensors of some micro-batches of this rank and of the others, exactly."""
        first = term_of(indices[0]) if indices else None
        maxima: list[float] = []
        shapes: list[torch.Size] = []
        if first is not None:
            maxima = [it.abs().max().item() for it in first]
            shapes = [it.shape for it in first]
        maxima, shapes = self._world.broadcast((maxima, shapes))
        sums = [
            ExactSum(maximum, self._micro_batches, shape, self._world.device)
            for maximum, shape in zip(maxima, shapes, strict=True)
        ]
        for index in indices:
            term, first = first or term_of(index), None
            for total, part in zip(sums, term, strict=True):
                total.add(part)
            del term, part  # as large as the next one
        for total in sums:
            self._world.add_up(total.total)
        return tuple(total.value().float() for total in sums)

    def _held_out_error(self, weights: MlpWeights) -> float:
        """Squared error on the held-out windows of all ranks, added in their order."""
        rounded = weights.to(self._dtype)
        own = {
            index: self._squared_error(rounded, index)
            for index in self._inputs
            if is_held_out(index, self._micro_batches) or self._micro_batches == 1
        }
        everywhere = {index: value for share in self._world.gather(own) for index, value in share.items()}
        return sum(everywhere[index] for index in sorted(everywhere))

    def _squared_error(self, weights: MlpWeights, index: int) -> float:
        output_NC = self._linearized(weights, index).output()
        return float((self._target_of(index) - output_NC).square().sum(dtype=torch.float64))
