"""Divergence of pruned models from the dense one, measured for many candidates in one pass, layer by layer.

The windows go through every candidate's layers; candidates share the computation up to the first layer in which they
differ. Memory holds one layer, and the windows' hidden states for each candidate.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.fidelity import Outputs, divergences
from hfprune_dist.distributed.gram_sums import is_held_out
from hfprune_dist.distributed.host_transfers import HostTransfers
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.distributed.layer_states import LayerStates, Named
from hfprune_dist.distributed.layer_stream import AfterLayer
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import Head, LayerReader, put_weights, run
from hfprune_dist.store.atomic_files import read_json, set_aside, write_json
from hfprune_dist.store.hashing import digest_of

# What a candidate makes of a layer: numbers that its ``Variants`` understand; None if the layer goes.
Choice = tuple[int, ...]
Candidate = tuple[Choice | None, ...]
# Weights that units own in a layer, by their names within it.
Weights = dict[str, Tensor]
# Micro-batch -> hidden states, on the CPU.
Hidden = dict[int, Tensor]
# Candidates that have been the same so far -> hidden states of this rank's micro-batches.
Branches = dict[tuple[int, ...], Hidden]

KNOWN = "search.json"


class Variants(Protocol):
    """The pruned layers that candidates have in place of the model's own."""

    def weights(self, number: int, layer: nn.Module, choices: Sequence[Choice]) -> Mapping[Choice, Weights]:
        """Choice -> weights that a layer of the model has, once pruned, in place of its own. Called for each layer in
        order; collective.
        """

    def go_past(self, layer: nn.Module) -> None:
        """Called instead of ``weights`` for layers that an earlier attempt has measured already."""


class Measurement:
    """Measures candidates on windows of all ranks; the same bits on any number of ranks.

    Args:
        checkpoint: the model that is pruned.
        micro_batches: number -> ids [windows, tokens], of all ranks together.
        reference: returns the ``dense_outputs`` for these micro-batches, or for more; collective.
        every: one token in this many is compared. With a large vocabulary, logits cost more than all layers.
        folder: keeps, for a later attempt, the results so far and the state of a measurement.
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
        folder: Path,
        after_each: AfterLayer,
    ) -> None:
        self._checkpoint = checkpoint
        self._variants = variants
        self._reference = reference
        self._every = every
        self._dtype = dtype
        self._world = world
        self._folder = folder
        self._after_each = after_each
        self._known: dict[str, float] = world.on_rank0(lambda: _read_known(folder / KNOWN))
        self._measurements = 0
        self._reader = LayerReader(checkpoint, dtype, world.device)
        self._transfers = HostTransfers(world.device)
        self._all = list(micro_batches)
        self._batches = share_of(micro_batches, world)

    def kl(self, candidates: Sequence[Candidate]) -> list[float]:
        """Every candidate's KL(dense || candidate) per token, in nats; equal candidates are measured once.

        Raises:
            UserError: if one is NaN or infinite.
        """
        unknown = [it for it in dict.fromkeys(candidates) if digest_of(it) not in self._known]
        if unknown:
            self._known |= {digest_of(it): kl for it, kl in zip(unknown, self._measure(unknown), strict=True)}
            self._world.on_rank0(self._write_known)
            self._states(unknown).discard()
        self._measurements += 1
        return [self._known[digest_of(it)] for it in candidates]

    def _write_known(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        write_json(self._folder / KNOWN, self._known)

    def _states(self, candidates: Sequence[Candidate]) -> LayerStates:
        """Saved state of a measurement of these candidates."""
        return LayerStates(self._folder / f"candidates-{digest_of(candidates)[:16]}", self._all, self._world)

    def _measure(self, candidates: Sequence[Candidate]) -> list[float]:
        """Measure candidates; save now and then and where it ends early, and resume after the last saved layer."""
        reference, states, variants = self._reference(), self._states(candidates), self._variants()
        num_layers = self._checkpoint.num_layers
        done, saved = states.newest()
        branches = _unpacked(saved, [it[:done] for it in candidates])
        if not done:
            branches = {tuple(range(len(candidates))): self._reader.embed(self._batches)}
        left = range(num_layers if done < num_layers else 0)
        for number, layer in self._transfers.layers(self._reader, left):
            if number < done:
                variants.go_past(layer)
            else:
                branches = self._through(variants, number, layer, branches, [it[number] for it in candidates])
                if states.is_due():
                    states.save(number + 1, _packed(branches, self._batches))
            del layer
            try:
                self._after_each(self._measurements * num_layers + number + 1)
            except Interrupted:
                if number >= done:
                    states.save(number + 1, _packed(branches, self._batches))
                raise
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
        """Divergence of every candidate from the dense model, added up in the order of the micro-batches."""
        head, models = self._reader.head(), [reference, *branches.values()]
        compared = self._transfers.to_device(
            (index, hidden[index][:, :: self._every]) for index in self._batches for hidden in models
        )
        own: dict[tuple[int, int], float] = {}
        for index in self._batches:
            states = (hidden_BTC for _, hidden_BTC in islice(compared, len(models)))
            dense, others = normed_outputs(head, next(states)), [head.outputs(hidden_BTC) for hidden_BTC in states]
            for members, kl in zip(branches, divergences(dense, others), strict=True):
                own |= {(member, index): kl for member in members}
        tokens = sum(self._world.all_gather(sum(ids[:, :: self._every].numel() for ids in self._batches.values())))
        totals = [0.0] * count
        for (member, _), kl in self._world.merge(own).items():
            totals[member] += kl
        if strange := sum(not math.isfinite(total) for total in totals):
            raise UserError(
                f"{strange} of {count} shapes can't be compared: their outputs, or the dense model's, are NaN or "
                f"infinite in {self._dtype}; set importance.dtype=float32 if it isn't yet, else check the checkpoint's "
                "weights"
            )
        return [total / tokens for total in totals]


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


def _packed(branches: Branches, indices: Iterable[int]) -> dict[int, dict[str, Tensor]]:
    """Regroup branches by micro-batch; a branch's name is its candidates' numbers."""
    return {index: {_name(members): hidden[index] for members, hidden in branches.items()} for index in indices}


def _unpacked(saved: Mapping[int, Named], so_far: Sequence[Candidate]) -> Branches:
    """Undo ``_packed``; ``so_far`` is what candidates have chosen in the layers that are done."""
    together: dict[Candidate, list[int]] = {}
    for member, choices in enumerate(so_far):
        together.setdefault(choices, []).append(member)
    return {
        tuple(members): {index: named[_name(members)] for index, named in saved.items()}
        for members in together.values()
    }


def _name(members: Sequence[int]) -> str:
    return ",".join(map(str, members))


def _read_known(file: Path) -> dict[str, float]:
    """Read what earlier attempts have measured; a damaged file is set aside."""
    try:
        known: dict[str, float] | None = read_json(file)
    except ValueError as error:
        set_aside(file, f"is cut short or not JSON ({error})")
        return {}
    return known or {}


def _split(branches: Branches, choices: Sequence[Choice | None]) -> dict[Choice | None, Branches]:
    """Choice -> the branches that continue with it; ``choices`` are the candidates' choices in the next layer."""
    split: dict[Choice | None, Branches] = {}
    for members, hidden in branches.items():
        for choice in dict.fromkeys(choices[member] for member in members):
            staying = tuple(member for member in members if choices[member] == choice)
            split.setdefault(choice, {})[staying] = dict(hidden)
    return split
