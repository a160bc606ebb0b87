"""Refit of the final norm: factors on its outputs that bring the pruned model's distribution to the dense one's."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from hfprune_dist.core.bound_losses import Batch, bind
from hfprune_dist.core.criteria import RANDOM_SIGNS, SELF_DISTILLATION
from hfprune_dist.core.final_norm import Place, best_factors, newton_step
from hfprune_dist.core.head import head_gradients
from hfprune_dist.distributed.gram_sums import GramSums
from hfprune_dist.distributed.host_transfers import HostTransfers
from hfprune_dist.distributed.layer_stream import AfterLayer
from hfprune_dist.distributed.window_sums import UnusableActivationsError
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import Head
from hfprune_dist.refit.measurement import Hidden, read_by_head, share_of
from hfprune_dist.refit.pruned_layers import PrunedLayers

# Factors are few: more tokens than these would only take time.
TOKENS = 2**15
# Of the random signs from which the curvature is estimated.
SEED = 0


@dataclass(frozen=True)
class NormFit:
    """Factors on the outputs of the final norm.

    Attributes:
        factors_C: float64 [hidden_size], on the device; all 1 if no others came closer to the dense model.
        kl: divergence from the dense model before the fit and in each later pass, on its windows, nats per token.
    """

    factors_C: Tensor
    kl: list[float]


def micro_batches_of_fit(windows_ST: Tensor, micro_batch_size: int) -> dict[int, Tensor]:
    """Micro-batches of up to ``TOKENS`` tokens in all, at even distances: number -> ids [windows, tokens]."""
    batches = windows_ST.split(micro_batch_size)
    every = -(-len(batches) // max(1, TOKENS // batches[0].numel()))
    return {index: batches[index] for index in range(0, len(batches), every)}


def pruned_outputs(
    pruned: PrunedLayers, micro_batches: Mapping[int, Tensor], world: World, after_each: AfterLayer
) -> Hidden:
    """What the head reads of a pruned model, before its final norm is refitted; as ``dense_outputs``."""
    batches = share_of(micro_batches, world)
    return read_by_head(pruned.reader, pruned.numbers, batches, world, after_each, change=pruned.change)


class ProportionateSums:
    """Exact sums over all ranks' micro-batches, unless one's vectors are out of all proportion to the first one's.

    Args:
        size: length of a vector.
        count: number of micro-batches of all ranks.
    """

    def __init__(self, size: int, count: int, world: World) -> None:
        self._sums = GramSums(0, size, count, world)  # its messages, which name a layer, are not shown

    def add(self, index: int, vectors_NC: Tensor) -> None:
        """Add a micro-batch's vectors; the first call is collective."""
        self._sums.add(index, vectors_NC)

    def of_all_ranks(self) -> Tensor | None:
        """The sum of v v^T, float64 [size, size], None if there is none; collective."""
        self._sums.agree_on_scale()
        try:
            fitted_CC, held_out_CC = self._sums.of_all_ranks()
        except UnusableActivationsError:
            return None
        return fitted_CC.add_(held_out_CC)


class FinalNormRefit:
    """Newton's method for the factors; the same bits on any number of ranks.

    Args:
        head: the pruned model's head, which is also the dense model's; its norm is not used.
        micro_batches: number -> ids [windows, tokens], of all ranks together.
        dense: what the head reads in the dense model for this rank's micro-batches, on the CPU.
        pruned: what it reads in the pruned model.
        after_each: called with the number of passes that are done.
    """

    def __init__(
        self,
        head: Head,
        micro_batches: Mapping[int, Tensor],
        dense: Hidden,
        pruned: Hidden,
        *,
        world: World,
        after_each: AfterLayer,
    ) -> None:
        self._head = head
        self._micro_batches = micro_batches
        self._dense = dense
        self._pruned = pruned
        self._transfers = HostTransfers(world.device)
        self._world = world
        self._after_each = after_each
        self._passes = 0
        self._tokens = sum(ids_BT.numel() for ids_BT in micro_batches.values())

    def fit(self) -> NormFit:
        """Return the closest of the factors that were reached; collective.

        Raises:
            UserError: if, for the model as it is, the divergence or a gradient at the final hidden states is NaN or
                infinite, or gradients are out of all proportion.
        """
        hidden_size = self._head.weight_VC.shape[1]
        factors_C = torch.ones(hidden_size, dtype=torch.float64, device=self._world.device)
        return NormFit(*best_factors(self._visit, factors_C))

    def _visit(self, factors_C: Tensor) -> Place:
        """The divergence over the tokens of all ranks, and a step that is the same on every rank; collective."""
        kl, gradient_C, curvature_CC = self._derivatives(factors_C)
        if not self._passes and (curvature_CC is None or not math.isfinite(kl)):
            what = (
                "gradients at the pruned model's final hidden states are NaN, infinite or out of all proportion"
                if math.isfinite(kl)
                else "the pruned model's outputs, or the dense model's, are NaN or infinite"
            )
            raise UserError(
                f"the final norm can't be refitted: {what} in {self._head.weight_VC.dtype}; set "
                "importance.dtype=float32 if it isn't yet, else check the checkpoint's weights"
            )
        self._passes += 1
        self._after_each(self._passes)
        if curvature_CC is None:
            return Place(kl, torch.zeros_like(factors_C), 0.0)
        step_C = newton_step(factors_C, gradient_C, curvature_CC)
        self._world.broadcast_tensor(step_C, 0)  # other ranks' devices may round in another way
        gain = self._world.broadcast(-0.5 * float(gradient_C @ step_C))
        return Place(kl, step_C, gain)

    def _derivatives(self, factors_C: Tensor) -> tuple[float, Tensor, Tensor | None]:
        """The mean divergence, its gradient and its curvature, the same bits on every rank; collective.

        Where a step has led far away, the model may be so sure of some tokens that those of other micro-batches are out
        of all proportion, or nothing is finite; then there is no curvature.
        """
        sums = ProportionateSums(len(factors_C), len(self._micro_batches), self._world)
        own: dict[int, tuple[float, Tensor]] = {}
        for index, dense_NC, pruned_NC in self._states():
            batch = self._batch(index)
            (kl_N, slope_NC), (_, signs_NC) = head_gradients(
                (pruned_NC * factors_C).to(pruned_NC),
                self._head.weight_VC,
                self._head.bias_V,
                [bind(loss, batch) for loss in (SELF_DISTILLATION, RANDOM_SIGNS)],
                dense_NC,
                after=self._head.after,
            )
            own[index] = float(kl_N.sum(dtype=torch.float64)), (slope_NC.double() * pruned_NC).sum(dim=0).cpu()
            sums.add(index, signs_NC.float() * pruned_NC)
        curvature_CC = sums.of_all_ranks()
        kls, slopes = zip(*self._world.merge(own).values(), strict=True)
        gradient_C = torch.stack(slopes).sum(dim=0).to(factors_C)
        kl, curvature = sum(kls) / self._tokens, None if curvature_CC is None else curvature_CC / self._tokens
        return kl, gradient_C / self._tokens, curvature

    def _states(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield the number of every micro-batch of this rank, and its states on the device [tokens, hidden_size]."""
        models = self._dense, self._pruned
        both = self._transfers.to_device((index, states[index]) for index in self._pruned for states in models)
        for _, dense_BTC in both:
            index, pruned_BTC = next(both)
            yield index, dense_BTC.flatten(0, 1), pruned_BTC.flatten(0, 1)

    def _batch(self, index: int) -> Batch:
        ids_BT = self._micro_batches[index].to(self._world.device)
        most = len(next(iter(self._micro_batches.values())))
        numbers = range(index * most, index * most + len(ids_BT))
        return Batch(ids_BT, numbers, len(self._head.weight_VC), SEED)
