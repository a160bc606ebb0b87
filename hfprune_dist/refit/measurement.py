"""Divergence of pruned models from the dense one, measured for many candidates in one pass, layer by layer.

The windows go through every candidate's layers; candidates share the computation up to the first layer in which they
differ. Memory holds one layer, and the windows' hidden states for each candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.fidelity import Outputs, divergences
from hfprune_dist.distributed.host_transfers import HostTransfers
from hfprune_dist.distributed.layer_stream import AfterLayer
from hfprune_dist.distributed.sums import is_held_out
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import Head, LayerReader, put_weights, run

# What a candidate makes of a layer: numbers that its ``Variants`` understand; None if the layer goes.
Choice = tuple[int, ...]
Candidate = tuple[Choice | None, ...]
# Weights that units own in a layer, by their names within it.
Weights = dict[str, Tensor]
# Micro-batch -> hidden states, on the CPU.
Hidden = dict[int, Tensor]
# Candidates that have been the same so far -> hidden states of this rank's micro-batches.
Branches = dict[tuple[int, ...], Hidden]


class Variants(Protocol):
    """The pruned layers that candidates have in place of the model's own."""

    def weights(self, number: int, layer: nn.Module, choices: Sequence[Choice]) -> Mapping[Choice, Weights]:
        """Choice -> weights that a layer of the model has, once pruned, in place of its own. Called for each layer in
        order; collective.
        """


class Measurement:
    """Measures candidates on windows of all ranks; what earlier calls have measured is known.

    Args:
        checkpoint: the model that is pruned.
        variants: makes those of one pass.
        micro_batches: number -> ids [windows, tokens], of all ranks together.
        reference: returns the ``dense_outputs`` for these micro-batches, or for more; collective.
        every: one token in this many is compared. With a large vocabulary, logits cost more than all layers.
        after_each: called with the number of layers that are done, over all measurements so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        variants: Callable[[], Variants],
        micro_batches: Mapping[int, Tensor],
        *,
        reference: Callable[[], Hidden],
        every: int = 1,
        dtype: torch.dtype,
        world: World,
        after_each: AfterLayer,
    ) -> None:
        self._checkpoint = checkpoint
        self._variants = variants
        self._reference = reference
        self._every = every
        self._dtype = dtype
        self._world = world
        self._after_each = after_each
        self._known: dict[Candidate, float] = {}
        self._done = 0
        self._reader = LayerReader(checkpoint, dtype, world.device)
        self._transfers = HostTransfers(world.device)
        self._batches = share_of(micro_batches, world)
        self._tokens = sum(ids_BT[:, ::every].numel() for ids_BT in micro_batches.values())

    def kl(self, candidates: Sequence[Candidate]) -> list[float]:
        """Every candidate's KL(dense || candidate) per token, in nats; equal candidates are measured once.

        Raises:
            UserError: if one is NaN or infinite.
        """
        unknown = [it for it in dict.fromkeys(candidates) if it not in self._known]
        if unknown:
            self._known.update(zip(unknown, self._measure(unknown), strict=True))
        return [self._known[it] for it in candidates]

    def _measure(self, candidates: Sequence[Candidate]) -> list[float]:
        reference, variants = self._reference(), self._variants()
        branches: Branches = {tuple(range(len(candidates))): self._reader.embed(self._batches)}
        for number, layer in self._transfers.layers(self._reader, range(self._checkpoint.num_layers)):
            branches = self._through(variants, number, layer, branches, [it[number] for it in candidates])
            del layer
            self._done += 1
            self._after_each(self._done)
        return self._compared(branches, reference, len(candidates))

    def _through(
        self, variants: Variants, number: int, layer: nn.Module, branches: Branches, choices: Sequence[Choice | None]
    ) -> Branches:
        """Take every branch through a layer, in the form that its candidates have chosen."""
        there = sorted({it for it in choices if it is not None})
        weights = variants.weights(number, layer, there)
        advanced: Branches = {}
        for choice, of_choice in _split(branches, choices).items():
            if choice is None:
                advanced |= of_choice
                continue
            put_weights(layer, weights[choice])
            for members, hidden in of_choice.items():
                advanced[members] = dict(self._transfers.through(hidden.items(), partial(run, layer)))
        return advanced

    def _compared(self, branches: Branches, reference: Hidden, count: int) -> list[float]:
        """Divergence of every candidate from the dense model."""
        head, models = self._reader.head(), [reference, *branches.values()]
        compared = self._transfers.to_device(
            (index, hidden[index][:, :: self._every]) for index in self._batches for hidden in models
        )
        totals = torch.zeros(count, dtype=torch.float64)
        for _ in self._batches:
            states = (hidden_BTC for _, hidden_BTC in islice(compared, len(models)))
            dense, others = normed_outputs(head, next(states)), [head.outputs(hidden_BTC) for hidden_BTC in states]
            for members, kl in zip(branches, divergences(dense, others), strict=True):
                totals[list(members)] += kl
        self._world.all_reduce(totals)
        if strange := int((~totals.isfinite()).sum()):
            raise UserError(
                f"{strange} of {count} shapes can't be compared: their outputs, or the dense model's, are NaN or "
                f"infinite in {self._dtype}; set importance.dtype=float32 if it isn't yet, else check the checkpoint's "
                "weights"
            )
        return (totals / self._tokens).tolist()


def normed_outputs(head: Head, normed_BTC: Tensor) -> Outputs:
    """A model's outputs, given what its head reads."""
    return Outputs(normed_BTC.flatten(0, 1), head.weight_VC, head.bias_V, head.after)


def dense_outputs(
    dense: Checkpoint,
    micro_batches: Mapping[int, Tensor],
    dtype: torch.dtype,
    world: World,
    after_each: AfterLayer,
) -> Hidden:
    """What the model's head reads for this rank's share of a ``Measurement``'s micro-batches."""
    reader, transfers = LayerReader(dense, dtype, world.device), HostTransfers(world.device)
    hidden = reader.embed(share_of(micro_batches, world))
    for number, layer in transfers.layers(reader, range(dense.num_layers)):
        hidden.update(transfers.through(hidden.items(), partial(run, layer)))
        del layer
        after_each(number + 1)
    hidden.update(transfers.through(hidden.items(), reader.final_norm()))
    return hidden


def share_of(micro_batches: Mapping[int, Tensor], world: World) -> dict[int, Tensor]:
    """The micro-batches of this rank."""
    return {index: micro_batches[index] for index in [*micro_batches][world.rank :: world.size]}


def one_by_one(windows_ST: Tensor) -> dict[int, Tensor]:
    """Split windows into micro-batches of one each, so that more ranks have some."""
    return dict(enumerate(windows_ST.split(1)))


def held_out_batches(windows_ST: Tensor, micro_batch_size: int, most: int) -> dict[int, Tensor]:
    """The first micro-batches among those that refits hold out to choose their ridge: of up to ``most`` windows, but at
    least one micro-batch.
    """
    batches = windows_ST.split(micro_batch_size)
    held_out = [it for it in range(len(batches)) if is_held_out(it, len(batches))] or [0]
    return {index: batches[index] for index in held_out[: max(1, most // micro_batch_size)]}


def _split(branches: Branches, choices: Sequence[Choice | None]) -> dict[Choice | None, Branches]:
    """Choice -> the branches that continue with it; ``choices`` are the candidates' choices in the next layer."""
    split: dict[Choice | None, Branches] = {}
    for members, hidden in branches.items():
        for choice in dict.fromkeys(choices[member] for member in members):
            staying = tuple(member for member in members if choices[member] == choice)
            split.setdefault(choice, {})[staying] = dict(hidden)
    return split
