"""Gauss-Newton steps on the kept neurons of a layer, computed by all ranks together."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hfprune_dist.core.gauss_newton import Biases, GaussNewtonSums, Linearized, MlpWeights, solve_normal_equations
from hfprune_dist.core.memory_limits import KEPT_BYTES
from hfprune_dist.distributed.host_transfers import HostTransfers
from hfprune_dist.distributed.sums import UnusableActivationsError, is_held_out
from hfprune_dist.distributed.world import World

# Iterations of conjugate gradients in the first step; each costs about as much as four forwards of the MLP.
ITERATIONS = 4
# Shares of the step that are tried on held-out windows.
STEP_LENGTHS = (0.0, 1.0, 0.5)


@dataclass(frozen=True)
class Start:
    """Where a step begins.

    Attributes:
        weights: of the MLP.
        hidden_KK: the mean of h h^T [kept, kept] over the tokens that the step is fitted on, where h are activations;
            those from before an earlier step will do: the mean sets the damping and preconditions the iterations, for
            which it need not be exact.
        tokens: the number of these tokens, on all ranks together.
    """

    weights: MlpWeights
    hidden_KK: Tensor
    tokens: int


class Reconstruction:
    """Improves the weights of a layer's pruned MLP.

    Args:
        number: the layer's, for messages.
        dtype: in which products are computed.
        biases: of gate and up, or of up only, in that dtype.
        inputs: micro-batch of this rank -> what the MLP reads in it, in that dtype [tokens, hidden_size], on the CPU.
        targets: micro-batch -> what the MLP should put out, without the down projection's bias, float32 on the CPU.
        micro_batches: their number on all ranks together.
        more_iterations: those of the step that follows on all windows.
    """

    def __init__(
        self,
        number: int,
        dtype: torch.dtype,
        biases: Biases,
        inputs: Mapping[int, Tensor],
        targets: Mapping[int, Tensor],
        *,
        micro_batches: int,
        more_iterations: int,
        world: World,
    ) -> None:
        self._number = number
        self._more_iterations = more_iterations
        self._dtype = dtype
        self._biases = biases
        self._inputs = inputs
        self._targets = targets
        self._transfers = HostTransfers(world.device)
        self._micro_batches = micro_batches
        self._world = world

    def improve(self, fitted: Start, whole: Start) -> MlpWeights:
        """The weights after a step, if it is better on held-out windows, and after another on all windows.

        The held-out windows, which the first step hasn't seen, also decide how far both steps go.

        Args:
            fitted: where the first step begins, on the windows that are not held out.
            whole: the same for all windows; its weights are the result if no step is better.

        Raises:
            UnusableActivationsError: if outputs or targets are NaN or infinite.
            UnresolvedError: if inputs or activations are mostly rounding errors.
        """
        known = [index for index in self._inputs if not is_held_out(index, self._micro_batches)]
        step = self._step(fitted, known, ITERATIONS)
        errors = [self._held_out_error(fitted.weights.plus(step, length)) for length in STEP_LENGTHS]
        if not all(map(math.isfinite, errors)):
            raise UnusableActivationsError(self._number, "values are NaN or infinite")
        length = STEP_LENGTHS[errors.index(min(errors))]
        if not length:
            return whole.weights
        moved = replace(whole, weights=fitted.weights.plus(step, length))
        return moved.weights.plus(self._step(moved, list(self._inputs), self._more_iterations), length)

    def _step(self, start: Start, indices: Sequence[int], iterations: int) -> MlpWeights:
        """A Gauss-Newton step, on some micro-batches of this rank and those of the other ranks."""
        around = self._around(start.weights, indices)
        shapes = [it.shape for it in start.weights.tensors()]
        hidden_size, kept = start.weights.down_CK.shape
        curvature_shapes = [*([kept] for _ in start.weights.rows_KC), [hidden_size, hidden_size]]
        *rows_K, inputs_CC = self._sum(curvature_shapes, map(Linearized.curvature, around()))
        curvature = GaussNewtonSums(tuple(rows_K), inputs_CC, start.hidden_KK * start.tokens, start.tokens)

        def product(change: MlpWeights) -> MlpWeights:
            rounded = change.to(self._dtype)

            def normal_product(at: Linearized) -> tuple[Tensor, ...]:
                return at.backward(at.forward(rounded)).tensors()

            return MlpWeights.of(*self._sum(shapes, map(normal_product, around())))

        targets = self._sent(self._targets, indices)

        def residual(at: Linearized) -> tuple[Tensor, ...]:
            return at.backward(next(targets) - at.output()).tensors()

        right = MlpWeights.of(*self._sum(shapes, map(residual, around())))
        return solve_normal_equations(product, right, curvature, iterations)

    def _around(self, weights: MlpWeights, indices: Sequence[int]) -> Callable[[], Iterator[Linearized]]:
        """A function that yields the MLP, linearized around some weights, on each of some micro-batches.

        What fits is kept for all iterations, which saves a third of their time; the rest is made anew each time.
        """
        rounded = weights.to(self._dtype)
        kept: dict[int, Linearized] = {}
        taken = itertools.accumulate(Linearized.bytes_of(weights, self._inputs[index]) for index in indices)
        fitting = [index for index, bytes_so_far in zip(indices, taken, strict=True) if bytes_so_far <= KEPT_BYTES]
        for index, input_NC in zip(fitting, self._sent(self._inputs, fitting), strict=True):
            kept[index] = Linearized(rounded, self._biases, input_NC)

        def each() -> Iterator[Linearized]:
            others = self._sent(self._inputs, [index for index in indices if index not in kept])
            for index in indices:
                yield kept[index] if index in kept else Linearized(rounded, self._biases, next(others))

        return each

    def _sent(self, tensors: Mapping[int, Tensor], indices: Sequence[int]) -> Iterator[Tensor]:
        """Tensors of some micro-batches, one after another on the device."""
        for _, tensor in self._transfers.to_device((index, tensors[index]) for index in indices):
            yield tensor
            del tensor  # before the one after the next is sent

    def _sum(self, shapes: Iterable[Sequence[int]], terms: Iterator[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Add up tensors of some shapes over all micro-batches, this rank's and the other ranks'."""
        sums = [torch.zeros(tuple(shape), dtype=torch.float64, device=self._world.device) for shape in shapes]
        for term in terms:
            for total, part in zip(sums, term, strict=True):
                total += part
            del term, part  # before the next ones, as large as they, are made
        for total in sums:
            self._world.all_reduce(total)
        return tuple(total.float() for total in sums)

    def _held_out_error(self, weights: MlpWeights) -> float:
        """Squared error on the held-out windows of all ranks."""
        rounded = weights.to(self._dtype)
        judged = [it for it in self._inputs if is_held_out(it, self._micro_batches) or self._micro_batches == 1]
        inputs, targets = (self._sent(tensors, judged) for tensors in (self._inputs, self._targets))
        error = torch.zeros((), dtype=torch.float64, device=self._world.device)
        for _ in judged:
            missing_NC = next(targets) - Linearized(rounded, self._biases, next(inputs)).output()
            error += missing_NC.square().sum(dtype=torch.float64)
        self._world.all_reduce(error)
        return float(error)
