"""Windows of text on their way through a model, layer by layer, with sums over what each layer reads on the way.

Every rank holds the hidden states of its own windows and one layer at a time: memory for a layer, its Gram matrix and
the windows, whatever the model's size.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.devices import send, to_host
from hfprune_dist.distributed.sums import Grams, GramSums, micro_batches_of
from hfprune_dist.distributed.world import World
from hfprune_dist.models.experts import observing, output_weights
from hfprune_dist.models.single_layer import LayerReader, run
from hfprune_dist.structures.units import Units

# Micro-batch of a rank -> its hidden states [windows, tokens, hidden_size].
States = dict[int, Tensor]
# Called on every rank, in passes layer by layer, with the number of layers that are done; may raise ``Interrupted``.
AfterLayer = Callable[[int], None]


class LayerStream:
    """The windows of this rank, standing before one of the model's layers.

    Args:
        windows_ST: the windows of all ranks, int64 [samples, sequence_length].
        micro_batch_size, merged: as in ``micro_batches_of``.
        stay: whether hidden states stay on the GPU until the next layer; otherwise they wait in main memory.

    Attributes:
        num_layers: of the model, whose layers ``reader`` makes.
        micro_batches: their number on all ranks together.
        states: micro-batch of this rank -> its hidden states [windows, tokens, hidden_size], as ``keep`` returns them.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows_ST: Tensor,
        dtype: torch.dtype,
        micro_batch_size: int,
        world: World,
        *,
        merged: int = 1,
        stay: bool = False,
    ) -> None:
        self.windows_ST = windows_ST
        self.num_layers = checkpoint.num_layers
        self.world = world
        self.reader = LayerReader(checkpoint, dtype, world.device)
        self._stay = stay
        batches = micro_batches_of(len(windows_ST), micro_batch_size, merged)
        self.micro_batches = len(batches)
        own = range(world.rank, len(batches), world.size)
        embedded = self.reader.embed({index: windows_ST[batches[index]] for index in own})
        self.states = {index: self.keep(hidden_BTC) for index, hidden_BTC in embedded.items()}

    def keep(self, states: Tensor) -> Tensor:
        """Hidden states, or the like, as they wait to be sent to the device."""
        return send(states, self.world.device) if self._stay else to_host(states)

    def standing(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the micro-batches' current hidden states on the device, one after another."""
        for index, hidden_BTC in self.states.items():
            yield index, send(hidden_BTC, self.world.device)

    def advance(self, compute: Callable[[Tensor], Tensor]) -> None:
        """Replace hidden states by what is computed from them, for example by running a layer."""
        for index, hidden_BTC in self.standing():
            self.states[index] = self.keep(compute(hidden_BTC))
            del hidden_BTC  # before the next ones are there

    def run_layers(self, after_each: AfterLayer, layers: Iterable[tuple[int, nn.Module]] | None = None) -> None:
        """Run the windows through some layers, one after another; by default through all."""
        done = itertools.count(1)  # enumerate would hold a layer while the next one is made
        for _, layer in layers or self.reader.layers(range(self.num_layers)):
            self.advance(partial(run, layer))
            del layer
            after_each(next(done))

    def final_hidden(self) -> Iterator[tuple[int, Tensor]]:
        """Yield this rank's micro-batches as the head reads them after the last layer, [windows, tokens, hidden_size]
        on the CPU; they leave the stream.
        """
        norm = self.reader.final_norm()
        for index in list(self.states):
            yield index, norm(send(self.states.pop(index), self.world.device)).cpu()

    def layers_left(
        self, layers: Sequence[int], done: Callable[[], set[int]], after_each: AfterLayer
    ) -> Iterator[tuple[int, nn.Module, bool]]:
        """Yield layers from the first one to the last of those ``layers`` that earlier attempts have left to do:
        (number, layer, whether it is one of those; otherwise it is only run). The caller takes the windows past each.
        Collective; only rank 0 asks which are ``done``, since that reads files, and tells of damaged ones.
        """
        finished = self.world.on_rank0(done)
        left = [number for number in layers if number not in finished]
        for number, layer in self.reader.layers(range(left[-1] + 1 if left else 0)):
            yield number, layer, number in left
            del layer
            after_each(number + 1)
        self.world.barrier()  # what one rank has written, all read next

    def observe(
        self, layer: nn.Module, names: Iterable[str], *, stay: bool = False
    ) -> Iterator[tuple[int, dict[str, list[Tensor]]]]:
        """Run the windows through a layer, and yield for each micro-batch what some modules read (``observing``); the
        windows then stand behind the layer, or ``stay`` before it.
        """
        for index, hidden_BTC in self.standing():
            with observing(layer, names) as seen:
                output_BTC = run(layer, hidden_BTC)
            if not stay:
                self.states[index] = self.keep(output_BTC)
            del hidden_BTC, output_BTC
            yield index, seen
            seen.clear()

    def grams(
        self, number: int, layer: nn.Module, kinds: Sequence[Units], owner: int | None = None
    ) -> dict[str, list[Grams]]:
        """Run windows through a layer, and return for some kinds of units the Gram matrices of what their output
        projections read, one for each expert or a single one; all ranks need them, or only their ``owner``.
        """
        made = partial(GramSums, number, micro_batches=self.micro_batches, world=self.world)
        sums = {units.output: [made(size=w_CD.shape[1]) for w_CD in output_weights(layer, units)] for units in kinds}
        for index, seen in self.observe(layer, sums):
            for name, of_name in sums.items():
                for of_expert, vectors_ND in zip(of_name, seen[name], strict=True):
                    of_expert.add(index, vectors_ND)
        totals = iter(GramSums.of_all_ranks([each for of_kind in sums.values() for each in of_kind], owner))
        return {units.kind: [next(totals) for _ in sums[units.output]] for units in kinds}
