"""How far a pruned model is from the dense one, and how that depends on factors on its norms' outputs.

A pass goes through the layers forwards, keeping what each of them reads, and then backwards: each layer runs once more,
with a graph, which carries the gradient from what the layer puts out to what it reads. So a rank holds one layer at a
time, and the hidden states of its windows before each layer, in main memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.core.head import Rows, head_gradients
from hfprune_dist.core.losses import distillation_gradient
from hfprune_dist.distributed.host_transfers import HostTransfers
from hfprune_dist.distributed.layer_stream import AfterLayer
from hfprune_dist.distributed.world import World
from hfprune_dist.models.norm_factors import Multiplied, multiplying, norms_of_layers
from hfprune_dist.models.single_layer import part_of, run, run_with_graph
from hfprune_dist.refit.measurement import Hidden, share_of
from hfprune_dist.refit.pruned_layers import PrunedLayers

# Number of a norm -> gradient at its factors, and the sum over tokens of its square, float64 [2, hidden_size].
NormSums = dict[int, Tensor]

# (number of a micro-batch, output of a part of the model, whatever else is at hand) -> the gradient at that output
SlopeOf = Callable[[int, Tensor, Tensor], Tensor]


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
        self._micro_batches = micro_batches
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
            self._pruned.change(number, layer)
            compute, norms = partial(run_with_graph, layer), self._norms_in(number, layer)
            slopes, of_layer = self._backwards(compute, norms, (entering.pop(), slopes), _given, factors_RC)
            sums |= of_layer
            del layer, compute, norms
            self._count()
        tokens = sum(ids_BT.numel() for ids_BT in self._micro_batches.values())
        gradient_RC, squares_RC = torch.stack([sums[it] for it in range(self.shape[0])], dim=1) / tokens
        return Derivatives(kl / tokens, gradient_RC, squares_RC)

    def count_from(self, passes: int) -> None:
        """Count the layers of an earlier attempt's passes among those that are done."""
        self._done = 2 * len(self._pruned.numbers) * passes

    def _forwards(self, factors_RC: Tensor) -> list[Hidden]:
        """What each layer reads of this rank's micro-batches, and what the last one puts out."""
        mine = share_of(self._micro_batches, self._world)
        entering = [self._pruned.reader.embed(mine)]
        for number, layer in self._layers(self._pruned.numbers):
            self._pruned.change(number, layer)
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
        return self._transfers.layers(self._pruned.reader, numbers)

    def _norms_in(self, number: int, layer: nn.Module) -> dict[int, nn.Module]:
        return {row: part_of(layer, name) for row, (it, name) in enumerate(self.norms) if it == number}

    def _through_head(self, hidden: Hidden, factors_RC: Tensor) -> tuple[float, Hidden, NormSums]:
        """The sum of the divergences of all ranks' tokens, its gradient at this rank's hidden states, and sums."""
        head, kls = self._head, dict[int, float]()

        def slope_of(index: int, normed_BTC: Tensor, dense_BTC: Tensor) -> Tensor:
            states = (normed_BTC.flatten(0, 1), head.weight_VC, head.bias_V)
            ((kl_N, slope_NC),) = head_gradients(*states, [_divergence], dense_BTC.flatten(0, 1), after=head.after)
            kls[index] = float(kl_N.sum(dtype=torch.float64))
            return slope_NC.view_as(normed_BTC)

        norms = {self.shape[0] - 1: head.norm}
        slopes, sums = self._backwards(head.norm, norms, (hidden, self._dense), slope_of, factors_RC)
        return sum(self._world.merge(kls).values()), slopes, sums

    def _backwards(
        self,
        compute: Callable[[Tensor], Tensor],
        norms: Mapping[int, nn.Module],
        states: tuple[Hidden, Hidden],
        slope_of: SlopeOf,
        factors_RC: Tensor,
    ) -> tuple[Hidden, NormSums]:
        """The gradient at what a part of the model reads in this rank's micro-batches, and all ranks' sums.

        Args:
            compute: runs the part, in which ``norms`` are.
            states: what it reads, and what ``slope_of`` gets besides its output.
        """
        own: dict[int, Tensor] = {}

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
                own[index] = self._sums(list(norms), seen, at_norms)
                yield index, gradient_BTC
                del input_BTC, other_BTC, output_BTC, slope_BTC, reached, gradient_BTC, at_norms, seen

        slopes = dict(self._transfers.to_host(each()))
        on_host = {index: sums.cpu() for index, sums in own.items()}  # only now, when there is nothing left to compute
        added = functools.reduce(torch.add, self._world.merge(on_host).values())
        return slopes, dict(zip(norms, added, strict=True))

    def _sums(self, norms: Sequence[int], seen: Sequence[Multiplied], at_norms: Sequence[Tensor]) -> Tensor:
        """What a micro-batch adds to the sums of some norms, float64 [norms, 2, hidden_size], on the device.

        Args:
            at_norms: the gradient at each of the products that were seen.
        """
        sums = torch.zeros(len(norms), 2, self.shape[1], dtype=torch.float64, device=self._world.device)
        for it, slope_BTC in zip(seen, at_norms, strict=True):
            terms_NC = (slope_BTC.float() * it.output_BTC.detach()).flatten(0, -2)
            both = [each_NC.sum(dim=0, dtype=torch.float64) for each_NC in (terms_NC, terms_NC.square())]
            sums[norms.index(it.norm)] += torch.stack(both)
        return sums

    def _count(self) -> None:
        self._done += 1
        self._after_each(self._done)


def _given(_index: int, _output_BTC: Tensor, slope_BTC: Tensor) -> Tensor:
    return slope_BTC


def _divergence(rows: Rows) -> tuple[Tensor, Tensor]:
    """The divergence from the dense model at some tokens, and its gradient at the logits."""
    assert rows.teacher_NV is not None
    return distillation_gradient(rows.logits_NV, rows.teacher_NV)
