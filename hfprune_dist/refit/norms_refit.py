"""Refit of all norms at once: factors on their outputs that bring the pruned model's distribution to the dense one's.

Layers that are fitted one by one each make up for what is lost so far, and none of them for what the logits lose in the
end. Factors on norms' outputs are few, a checkpoint holds them in weights that it has anyway, and together they reach
every block. The divergence is lowered by L-BFGS (``core.quasi_newton``) on some of the windows.

A pass goes through the layers forwards, keeping what each of them reads, and then backwards: each layer runs once more,
with a graph, which carries the gradient from what the layer puts out to what it reads. So a rank holds one layer at a
time, and the hidden states of its windows before each layer, in main memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.head import Rows, head_gradients
from hfprune_dist.core.losses import distillation_gradient
from hfprune_dist.core.quasi_newton import QuasiNewton
from hfprune_dist.distributed.host_transfers import HostTransfers
from hfprune_dist.distributed.layer_stream import AfterLayer
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.models.norm_factors import Multiplied, multiplying, norms_of_layers
from hfprune_dist.models.single_layer import LayerReader, part_of, put_weights, run, run_with_graph, weights_kept
from hfprune_dist.refit.measurement import Hidden, share_of
from hfprune_dist.structures.kept import Kept

# Factors are few: more tokens than these would only take time.
TOKENS = 2**15
# Micro-batches have at most so many tokens, or one window, whatever calibration has: this refit sees few tokens, which
# would make few larger ones, and ranks without any would wait for the others.
AT_ONCE = 2**10
# A channel that hardly any token uses has hardly any curvature; each gets this share of its norm's mean.
RIDGE = 0.1

# Number of a norm -> gradient at its factors, and the sum over tokens of its square, float64 [2, hidden_size].
NormSums = dict[int, Tensor]
# (number of a micro-batch, output of a part of the model, whatever else is at hand) -> the gradient at that output
SlopeOf = Callable[[int, Tensor, Tensor], Tensor]


def micro_batches_of_norms(windows_ST: Tensor, micro_batch_size: int) -> dict[int, Tensor]:
    """Micro-batches of up to ``TOKENS`` tokens in all, at even distances: number -> ids [windows, tokens]."""
    batches = windows_ST.split(max(1, min(micro_batch_size, AT_ONCE // windows_ST.shape[1])))
    every = -(-len(batches) // max(1, TOKENS // batches[0].numel()))
    return {index: batches[index] for index in range(0, len(batches), every)}


class PrunedLayers:
    """The layers of a pruned model that isn't written yet.

    Args:
        kept: what stays of the checkpoint.
        replacements: name of a tensor of the checkpoint -> function that reads what the pruned model has in its place.
        dtype: dtype of weights and activations.

    Attributes:
        numbers: of the layers that stay, in order.
        reader: of the checkpoint's layers; ``change`` makes one of them the pruned model's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        kept: Kept,
        replacements: Mapping[str, Callable[[], Tensor]],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.checkpoint = checkpoint
        self.numbers = kept.layers
        self.reader = LayerReader(checkpoint, dtype, device)
        self._kept = kept
        self._replacements = replacements
        self._dtype = dtype
        self._device = device

    def change(self, number: int, layer: nn.Module) -> None:
        """Give a layer, after its number, the pruned model's weights."""
        for kind in self._kept.units:
            units, kept = self.checkpoint.structures[kind], self._kept.of_layer(number, kind)
            put_weights(layer, weights_kept(layer, units, kept))
        prefix = f"{self.checkpoint.family.layers}.{number}."
        new = {name.removeprefix(prefix): it for name, it in self._replacements.items() if name.startswith(prefix)}
        put_weights(layer, {name: read().to(self._device, self._dtype) for name, read in new.items()})


@dataclass(frozen=True)
class Derivatives:
    """The divergence at some factors, and its derivatives by them, per token; the same bits on every rank.

    Attributes:
        kl: mean divergence of the pruned model from the dense one, nats.
        gradient_RC: float64 [norms, hidden_size], on the CPU.
        squares_RC: mean over tokens of the square of what each token of a norm's outputs adds to the gradient.
    """

    kl: float
    gradient_RC: Tensor
    squares_RC: Tensor


class NormGradients:
    """Derivatives by factors on the outputs of the norms before, perhaps after, each block, and of the final norm.

    Args:
        micro_batches: number -> ids [windows, tokens], of all ranks together.
        dense: what the head reads in the dense model for this rank's micro-batches, on the CPU.
        after_each: called with the number of layers that are done, forwards and backwards, over all passes.

    Attributes:
        norms: (layer, name within it) of each norm but the final one, which is the last.
        shape: of factors: [norms, hidden_size].
    """

    def __init__(
        self,
        pruned: PrunedLayers,
        micro_batches: Mapping[int, Tensor],
        dense: Hidden,
        *,
        world: World,
        after_each: AfterLayer,
    ) -> None:
        self.norms = norms_of_layers(pruned.checkpoint, pruned.numbers)
        self._pruned = pruned
        self._batches = share_of(micro_batches, world)
        self._tokens = sum(ids_BT.numel() for ids_BT in micro_batches.values())
        self._dense = dense
        self._head = pruned.reader.head()
        self._transfers = HostTransfers(world.device)
        self._world = world
        self._after_each = after_each
        self._done = 0
        self.shape = len(self.norms) + 1, self._head.weight_VC.shape[1]

    def at(self, factors_RC: Tensor) -> Derivatives:
        """The derivatives at some factors, which must be the same on every rank; collective.

        Args:
            factors_RC: float64 [norms, hidden_size], on any device.
        """
        factors_RC = factors_RC.to(self._world.device, torch.float32)
        entering = self._forwards(factors_RC)
        kl, slopes, sums = self._through_head(entering.pop(), factors_RC)
        for number, layer in self._layers(self._pruned.numbers[::-1]):
            compute, norms = partial(run_with_graph, layer), self._norms_in(number, layer)
            slopes, of_layer = self._backwards(compute, norms, (entering.pop(), slopes), _given, factors_RC)
            sums |= of_layer
            del layer, compute, norms
            self._count()
        of_norms = torch.stack([sums[row] for row in range(self.shape[0])], dim=1)
        for total in (kl, of_norms):
            self._world.all_reduce(total)
        gradient_RC, squares_RC = of_norms.cpu() / self._tokens
        return Derivatives(float(kl) / self._tokens, gradient_RC, squares_RC)

    def _forwards(self, factors_RC: Tensor) -> list[Hidden]:
        """What each layer reads of this rank's micro-batches, and what the last one puts out."""
        entering = [self._pruned.reader.embed(self._batches)]
        for number, layer in self._layers(self._pruned.numbers):
            with multiplying(self._norms_in(number, layer), factors_RC) as seen:

                def through(hidden_BTC: Tensor, layer: nn.Module = layer) -> Tensor:
                    output_BTC = run(layer, hidden_BTC)
                    seen.clear()
                    return output_BTC

                entering.append(dict(self._transfers.through(entering[-1].items(), through)))
            del layer, through
            self._count()
        return entering

    def _layers(self, numbers: Sequence[int]) -> Iterator[tuple[int, nn.Module]]:
        for number, layer in self._transfers.layers(self._pruned.reader, numbers):
            self._pruned.change(number, layer)
            yield number, layer
            del layer

    def _norms_in(self, number: int, layer: nn.Module) -> dict[int, nn.Module]:
        return {row: part_of(layer, name) for row, (owner, name) in enumerate(self.norms) if owner == number}

    def _through_head(self, hidden: Hidden, factors_RC: Tensor) -> tuple[Tensor, Hidden, NormSums]:
        """The sum of the divergences of this rank's tokens, its gradient at their hidden states, and sums."""
        head, kl = self._head, torch.zeros((), dtype=torch.float64, device=self._world.device)

        def slope_of(_index: int, normed_BTC: Tensor, dense_BTC: Tensor) -> Tensor:
            states = (normed_BTC.flatten(0, 1), head.weight_VC, head.bias_V)
            ((kl_N, slope_NC),) = head_gradients(*states, [_divergence], dense_BTC.flatten(0, 1), after=head.after)
            kl.add_(kl_N.sum(dtype=torch.float64))
            return slope_NC.view_as(normed_BTC)

        norms = {self.shape[0] - 1: head.norm}
        slopes, sums = self._backwards(head.norm, norms, (hidden, self._dense), slope_of, factors_RC)
        return kl, slopes, sums

    def _backwards(
        self,
        compute: Callable[[Tensor], Tensor],
        norms: Mapping[int, nn.Module],
        states: tuple[Hidden, Hidden],
        slope_of: SlopeOf,
        factors_RC: Tensor,
    ) -> tuple[Hidden, NormSums]:
        """The gradient at what a part of the model reads in this rank's micro-batches, and sums over them.

        Args:
            compute: runs the part, in which ``norms`` are.
            states: what it reads, and what ``slope_of`` gets besides its output.
        """
        zeros = partial(torch.zeros, 2, self.shape[1], dtype=torch.float64, device=self._world.device)
        sums: NormSums = {row: zeros() for row in norms}

        def each() -> Iterator[tuple[int, Tensor]]:
            both = self._transfers.to_device((index, it[index]) for index in states[0] for it in states)
            for index, input_BTC in both:
                _, other_BTC = next(both)
                input_BTC = input_BTC.detach().requires_grad_()
                with multiplying(norms, factors_RC) as seen, torch.enable_grad():
                    output_BTC = compute(input_BTC)
                slope_BTC = slope_of(index, output_BTC.detach(), other_BTC)
                reached = input_BTC, *[it.product_BTC for it in seen]
                gradient_BTC, *at_norms = torch.autograd.grad(output_BTC, reached, slope_BTC)
                _add(sums, seen, at_norms)
                yield index, gradient_BTC
                del input_BTC, other_BTC, output_BTC, slope_BTC, reached, gradient_BTC, at_norms, seen

        return dict(self._transfers.to_host(each())), sums

    def _count(self) -> None:
        self._done += 1
        self._after_each(self._done)


def _add(sums: NormSums, seen: Sequence[Multiplied], at_norms: Sequence[Tensor]) -> None:
    """Add a micro-batch's terms to the sums of some norms, given the gradients at the products that were seen."""
    for it, slope_BTC in zip(seen, at_norms, strict=True):
        terms_NC = (slope_BTC.float() * it.output_BTC.detach()).flatten(0, -2)
        sums[it.norm] += torch.stack([each_NC.sum(0, dtype=torch.float64) for each_NC in (terms_NC, terms_NC.square())])


def _given(_index: int, _output_BTC: Tensor, slope_BTC: Tensor) -> Tensor:
    return slope_BTC


def _divergence(rows: Rows) -> tuple[Tensor, Tensor]:
    """The divergence from the dense model at some tokens, and its gradient at the logits."""
    assert rows.teacher_NV is not None
    return distillation_gradient(rows.logits_NV, rows.teacher_NV)


@dataclass(frozen=True)
class NormsFit:
    """Factors on the outputs of norms.

    Attributes:
        factors_RC: float64 [norms, hidden_size], on the CPU.
        kl: divergence from the dense model in each pass, the first before the fit, nats per token.
    """

    factors_RC: Tensor
    kl: list[float]


def fit_norms(gradients: NormGradients) -> NormsFit:
    """Find the factors with the lowest divergence; collective.

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
    return NormsFit(search.best_P.view_as(ones_RC), search.values)


def curvature_of(squares_RC: Tensor) -> Tensor:
    """A guess at the divergence's second derivatives along each factor alone; their scale is irrelevant.

    The square of a token's gradient stands in for its curvature, as in the Fisher matrix. What no token depends on
    stays where it is: its curvature is infinite.

    Args:
        squares_RC: means over tokens of squared gradients, float64 [norms, hidden_size].
    """
    ridged_RC = squares_RC + RIDGE * squares_RC.mean(dim=1, keepdim=True)
    return ridged_RC.where(ridged_RC > 0, torch.inf)
