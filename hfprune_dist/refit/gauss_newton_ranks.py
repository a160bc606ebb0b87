"""Gauss-Newton steps on the kept neurons of a layer, computed by all ranks together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hfprune_dist.core.devices import send
from hfprune_dist.core.gauss_newton import Biases, GaussNewtonSums, Linearized, MlpWeights, solve_normal_equations
from hfprune_dist.core.memory_limits import KEPT_BYTES
from hfprune_dist.distributed.sums import is_held_out, unusable_activations
from hfprune_dist.distributed.world import World
from hfprune_dist.refit.output_refit import Problems, Solution

# Of every eight micro-batches, those on which a step's length is computed. It is then off by a few percent, and the
# step loses only the square of that share of its gain. With two ranks, each has one of them.
MEASURED = 0, 5
# Shares of the step that are tried on held-out windows.
STEP_LENGTHS = (0.0, 1.0, 0.5)


class Reconstruction:
    """Improves the weights of a layer's pruned MLP.

    Args:
        number: the layer's, for messages.
        dtype: in which products are computed.
        biases: of gate and up, or of up only, in that dtype.
        inputs: micro-batch of this rank -> what the MLP reads in it, in that dtype [tokens, hidden_size], where
            ``LayerStream.keep`` leaves it.
        targets: micro-batch -> what the MLP should put out, without the down projection's bias, float32.
        micro_batches: their number on all ranks together.
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
        world: World,
    ) -> None:
        self._number = number
        self._dtype = dtype
        self._biases = biases
        self._inputs = inputs
        self._targets = targets
        self._micro_batches = micro_batches
        self._world = world

    def improve(
        self, rows_KC: tuple[Tensor, ...], solution: Solution, problems: Problems, iterations: int, again: int
    ) -> MlpWeights:
        """The weights after a step, if it is better on held-out windows, and after another on all windows.

        The held-out windows, which the first step hasn't seen, also decide how far both steps go.

        Args:
            rows_KC: weights of gate and up, or only of up.
            solution: the down projection by least squares; the result has that for all windows if no step is better.
            problems: what it solves, with the sums of h h^T over the tokens of each step. They set the damping and
                precondition the iterations, for which those from before an earlier step will do.
            iterations: of conjugate gradients in the first step; each costs about as much as four forwards of the MLP.
            again: of those in the step that follows on all windows; 0: the first step is added to the weights
                fitted on all windows, and no other follows.

        Raises:
            UserError: if outputs or targets are NaN or infinite.
            UnresolvedError: if inputs or activations are mostly rounding errors.
        """
        # Held-out windows judge a step, so the first one begins at weights that haven't seen them.
        fitted, whole = (MlpWeights(rows_KC, down_CK) for down_CK in solution)
        known = [index for index in self._inputs if not is_held_out(index, self._micro_batches)]
        step = self._step(fitted, problems.fitted.gram_KK, known, iterations)
        found = torch.stack([self._held_out_error(fitted.plus(step, length)) for length in STEP_LENGTHS])
        self._world.all_reduce(found)
        errors = found.tolist()
        if not all(map(math.isfinite, errors)):
            raise unusable_activations(self._number, "values are NaN or infinite")
        length = STEP_LENGTHS[errors.index(min(errors))]
        if not length:
            return whole
        if not again:
            return whole.plus(step, length)
        moved = fitted.plus(step, length)
        return moved.plus(self._step(moved, problems.whole().gram_KK, list(self._inputs), again), length)

    def _step(self, start: MlpWeights, hidden_KK: Tensor, indices: Sequence[int], iterations: int) -> MlpWeights:
        """A Gauss-Newton step, on some micro-batches of this rank and those of the other ranks."""
        around = self._around(start, indices)
        shapes = [tensor.shape for tensor in start.tensors()]
        hidden_size, kept = start.down_CK.shape
        curvature_shapes = [*([kept] for _ in start.rows_KC), [hidden_size, hidden_size]]
        *rows_K, inputs_CC = self._sum(curvature_shapes, map(Linearized.curvature, around()))
        measured = [index for index in indices if index % 8 in MEASURED]
        counts = [sum(len(self._inputs[index]) for index in some) for some in (indices, measured)]
        tokens, seen = map(sum, zip(*self._world.all_gather(counts), strict=True))
        curvature = GaussNewtonSums(tuple(rows_K), inputs_CC, hidden_KK, tokens, start)

        def product(change: MlpWeights) -> MlpWeights:
            rounded = change.to(self._dtype)
            return MlpWeights.of(*self._sum(shapes, (at.backward(at.forward(rounded)).tensors() for at in around())))

        def squared_length(change: MlpWeights) -> Tensor:
            rounded = change.to(self._dtype)
            squares = ((at.forward(rounded).square().sum(dtype=torch.float64),) for at in around(measured))
            return self._sum([[]], squares)[0] * (tokens / seen)

        targets = map(self._target, indices)
        missing = (at.backward(next(targets) - at.output()).tensors() for at in around())
        right = MlpWeights.of(*self._sum(shapes, missing))
        return solve_normal_equations(product, squared_length, right, curvature, iterations)

    def _around(self, weights: MlpWeights, indices: Sequence[int]) -> Callable[..., Iterator[Linearized]]:
        """A function that yields the MLP, linearized around some weights, on each of some micro-batches, or on those
        of them that it is given.

        What fits is kept for all iterations, which saves a third of their time; the rest is made anew each time.
        """
        rounded, kept, room = weights.to(self._dtype), dict[int, Linearized](), KEPT_BYTES
        for index in indices:
            room -= Linearized.bytes_of(weights, self._inputs[index])
            if room >= 0:
                kept[index] = self._linearized(rounded, index)
        return lambda some=indices: (kept.get(index) or self._linearized(rounded, index) for index in some)

    def _linearized(self, rounded: MlpWeights, index: int) -> Linearized:
        return Linearized(rounded, self._biases, send(self._inputs[index], self._world.device))

    def _target(self, index: int) -> Tensor:
        return send(self._targets[index], self._world.device)

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

    def _held_out_error(self, weights: MlpWeights) -> Tensor:
        """Squared error on the held-out windows of this rank, float64."""
        rounded = weights.to(self._dtype)
        error = torch.zeros((), dtype=torch.float64, device=self._world.device)
        for index in self._inputs:
            if is_held_out(index, self._micro_batches):
                missing_NC = self._target(index) - self._linearized(rounded, index).output()
                error += missing_NC.square().sum(dtype=torch.float64)
        return error
