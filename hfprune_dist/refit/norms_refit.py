"""Refit of all norms at once: factors on their outputs that bring the pruned model's distribution to the dense one's.

Layers that are fitted one by one each make up for what is lost so far, and none of them for what the logits lose in the
end. Factors on norms' outputs are few, a checkpoint holds them in weights that it has anyway, and together they reach
every block. The divergence is lowered by L-BFGS (``core.quasi_newton``) on some of the windows, and the factors stay
only if it is lower on others as well.

A pass goes through the layers forwards, keeping what each of them reads, and then backwards: each layer runs once more,
with a graph, which carries the gradient from what the layer puts out to what it reads. So a rank holds one layer at a
time, and the hidden states of its windows before each layer, in main memory or, if there is room, on the GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from hfprune_dist.core.devices import send
from hfprune_dist.core.fidelity import divergences
from hfprune_dist.core.head import head_gradients
from hfprune_dist.core.losses import divergence_of_rows
from hfprune_dist.core.memory_limits import NORM_TOKENS
from hfprune_dist.core.quasi_newton import QuasiNewton
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream, States
from hfprune_dist.errors import UserError
from hfprune_dist.models.norm_factors import multiplying, norms_of_layers
from hfprune_dist.models.single_layer import part_of, run, run_with_graph
from hfprune_dist.refit.measurement import PrunedLayers

# A channel that hardly any token uses has hardly any curvature; each gets this share of its norm's mean.
RIDGE = 0.1


def windows_of_norms(windows_ST: Tensor, tokens: int = NORM_TOKENS) -> Tensor:
    """Evenly spaced windows, of up to so many tokens in all, but at least one."""
    return windows_ST[:: -(-len(windows_ST) // max(1, tokens // windows_ST.shape[1]))]


class Derivatives(NamedTuple):
    """The divergence at some factors, and its derivatives with respect to them, per token; the same bits on every rank.

    Attributes:
        kl: mean divergence of the pruned model from the dense one, nats.
        gradient_RC: float64 [norms, hidden_size], on the CPU.
        squares_RC: mean over tokens of the square of what each token of a norm's outputs adds to the gradient.
    """

    kl: float
    gradient_RC: Tensor
    squares_RC: Tensor


class NormGradients:
    """Derivatives with respect to factors on the outputs of all norms: before and after blocks, and the final one.

    Args:
        stream: the windows before the first layer.
        dense: what the head reads in the dense model for them, on the CPU.
        after_each: called with the number of layers that are done, forwards and backwards, over all passes.

    Attributes:
        norms: (layer, name within it) of each norm but the final one, which is the last.
        shape: of factors: [norms, hidden_size].
    """

    def __init__(self, pruned: PrunedLayers, stream: LayerStream, dense: States, after_each: AfterLayer) -> None:
        self.norms = norms_of_layers(pruned.checkpoint, pruned.kept.layers)
        self._pruned = pruned
        self._stream = stream
        self._dense = dense
        self._head = stream.reader.head()
        self._device = stream.world.device
        self._after_each = after_each
        self._done = itertools.count(1)
        self.shape = len(self.norms) + 1, self._head.weight_VC.shape[1]

    def at(self, factors_RC: Tensor) -> Derivatives:
        """The derivatives at some factors, which must be the same on every rank; collective.

        Args:
            factors_RC: float64 [norms, hidden_size], on any device.
        """
        factors_RC, layers = factors_RC.to(self._device, torch.float32), self._pruned.kept.layers
        entering = [*self._forwards(factors_RC)]
        kl = torch.zeros((), dtype=torch.float64, device=self._device)
        sums_2RC = torch.zeros(2, *self.shape, dtype=torch.float64, device=self._device)

        def at_head(index: int, normed_BTC: Tensor) -> Tensor:
            model, dense = map(self._head.outputs, (normed_BTC, send(self._dense[index], self._device)))
            ((kl_N, slope_NC),) = head_gradients(model, [divergence_of_rows], dense)
            kl.add_(kl_N.sum(dtype=torch.float64))
            return slope_NC.view_as(normed_BTC)

        norms = {self.shape[0] - 1: self._head.norm}
        slopes = self._back(self._head.norm, norms, entering.pop(), at_head, factors_RC, sums_2RC)
        for number, layer in self._pruned.layers(layers[::-1]):
            compute, norms = partial(run_with_graph, layer), self._norms_in(number, layer)

            def at_output(index: int, _output_BTC: Tensor, slopes: States = slopes) -> Tensor:
                return send(slopes[index], self._device)

            slopes = self._back(compute, norms, entering.pop(), at_output, factors_RC, sums_2RC)
            del layer, compute, norms
            self._after_each(next(self._done))
        for total in (kl, sums_2RC):
            self._stream.world.all_reduce(total)
        tokens = self._stream.windows_ST.numel()
        return Derivatives(float(kl) / tokens, *(sums_2RC.cpu() / tokens))

    def kl_at(self, factors_RC: Tensor) -> float:
        """The divergence alone at some factors, nats per token, from logits in float32; collective."""
        factors_RC, kl = factors_RC.to(self._device, torch.float32), torch.zeros((), dtype=torch.float64)
        *_, reached = self._forwards(factors_RC)
        for index, hidden_BTC in reached.items():
            with multiplying({self.shape[0] - 1: self._head.norm}, factors_RC):
                normed_BTC = self._head.norm(send(hidden_BTC, self._device))
            model, dense = map(self._head.outputs, (normed_BTC, send(self._dense[index], self._device)))
            kl += divergences(dense, [model])[0]
        self._stream.world.all_reduce(kl)
        return float(kl) / self._stream.windows_ST.numel()

    def _forwards(self, factors_RC: Tensor) -> Iterator[States]:
        """Yield what each layer reads in this rank's micro-batches, and then what the last one puts out."""
        states = self._stream.states
        for number, layer in self._pruned.layers(self._pruned.kept.layers):
            yield states
            norms, outputs = self._norms_in(number, layer), States()
            for index, hidden_BTC in states.items():
                with multiplying(norms, factors_RC):
                    outputs[index] = self._stream.keep(run(layer, send(hidden_BTC, self._device)))
            states = outputs
            del layer, norms
            self._after_each(next(self._done))
        yield states

    def _norms_in(self, number: int, layer: nn.Module) -> dict[int, nn.Module]:
        return {row: part_of(layer, name) for row, (owner, name) in enumerate(self.norms) if owner == number}

    def _back(
        self,
        compute: Callable[[Tensor], Tensor],
        norms: Mapping[int, nn.Module],
        states: States,
        slope_at: Callable[[int, Tensor], Tensor],
        factors_RC: Tensor,
        sums_2RC: Tensor,
    ) -> States:
        """The gradient at what a part of the model reads in this rank's micro-batches.

        Args:
            compute: runs the part, in which ``norms`` are.
            states: what it reads.
            slope_at: number of a micro-batch, and the part's output in it -> the gradient there.
            sums_2RC: to which what norms add to the gradient, and its square for each token, is added.
        """
        slopes: States = {}
        for index, hidden_BTC in states.items():
            input_BTC = send(hidden_BTC, self._device).detach().requires_grad_()
            with multiplying(norms, factors_RC) as seen, torch.enable_grad():
                output_BTC = compute(input_BTC)
            reached = [input_BTC, *(product_BTC for _, _, product_BTC in seen)]
            gradient_BTC, *at_norms = torch.autograd.grad(output_BTC, reached, slope_at(index, output_BTC.detach()))
            for (row, norm_BTC, _), slope_BTC in zip(seen, at_norms, strict=True):
                terms_NC = (slope_BTC.float() * norm_BTC.detach()).flatten(0, -2)
                for sums_RC, terms in zip(sums_2RC, (terms_NC, terms_NC.square()), strict=True):
                    sums_RC[row] += terms.sum(0, dtype=torch.float64)
            slopes[index] = self._stream.keep(gradient_BTC)
            del input_BTC, output_BTC, reached, gradient_BTC, at_norms, seen
        return slopes


def fit_norms(gradients: NormGradients, held_out: NormGradients) -> tuple[Tensor, list[float], list[float]]:
    """Find the factors with the lowest divergence; collective.

    Args:
        held_out: of the same model, on windows to which nothing is fitted here.

    Returns:
        The factors, float64 [norms, hidden_size] on the CPU, or ones if the divergence on the held-out windows is no
        lower with them; and the divergence from the dense model, nats per token: in each pass, the first before the
        fit, and on the held-out windows before and after it.

    Raises:
        UserError: if the divergence of the model as it is, or its gradient, is NaN or infinite.
    """
    ones_RC = torch.ones(gradients.shape, dtype=torch.float64)
    there = gradients.at(ones_RC)
    if not (math.isfinite(there.kl) and there.gradient_RC.isfinite().all()):
        raise UserError(
            "the norms can't be refitted: outputs of the pruned model or of the dense model, or gradients, are NaN "
            "or infinite; set importance.dtype=float32 if it isn't yet, else check the checkpoint's weights"
        )
    search = QuasiNewton(ones_RC.flatten(), curvature_of(there.squares_RC).flatten())
    search.tell(there.kl, there.gradient_RC.flatten())
    while not search.is_over:
        there = gradients.at(search.candidate_P.view_as(ones_RC))
        search.tell(there.kl, there.gradient_RC.flatten())
    factors_RC = search.best_P.view_as(ones_RC)
    before, after = held_out.kl_at(ones_RC), held_out.kl_at(factors_RC)
    return factors_RC if after < before else ones_RC, search.values, [before, after]


def curvature_of(squares_RC: Tensor) -> Tensor:
    """A guess at the divergence's second derivatives along each factor alone; their scale is irrelevant.

    The square of a token's gradient stands in for its curvature, as in the Fisher matrix. What no token depends on
    stays where it is: its curvature is infinite.

    Args:
        squares_RC: means over tokens of squared gradients, float64 [norms, hidden_size].
    """
    ridged_RC = squares_RC + RIDGE * squares_RC.mean(dim=1, keepdim=True)
    return ridged_RC.where(ridged_RC > 0, torch.inf)
