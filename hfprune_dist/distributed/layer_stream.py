"""Windows of text on their way through a model, layer by layer, with sums over what each layer reads on the way.

Every rank holds the hidden states of its own windows and one layer at a time: memory for a layer, its Gram matrix and
the windows, whatever the model's size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.distributed.host_transfers import HostTransfers
from hfprune_dist.distributed.layer_check import TOLERANCES, refuse_departure, relative_error
from hfprune_dist.distributed.sums import Float64Sum, Grams, GramSums, Split
from hfprune_dist.distributed.world import World
from hfprune_dist.models.experts import channels_of, channels_read
from hfprune_dist.models.single_layer import (
    LayerReader,
    input_of,
    linear_of,
    mlp_of,
    norm_before,
    output_of,
    part_of,
    read_by,
    residual_update,
    run,
)
from hfprune_dist.structures.units import Units

# Called on every rank, in passes layer by layer, with the number of layers that are done; may raise ``Interrupted``.
AfterLayer = Callable[[int], None]
# Takes what output projections of some units have read in a micro-batch, given its number.
TakeRead = Callable[[int, Units, Any], None]


class LayerStream:
    """The windows of this rank, standing before one of the model's layers.

    Args:
        windows_ST: the windows of all ranks, int64 [samples, sequence_length].
        micro_batch_size: windows per forward.

    Attributes:
        num_layers: of the model.
        split: of all ranks' micro-batches.
    """

    def __init__(
        self, checkpoint: Checkpoint, windows_ST: Tensor, dtype: torch.dtype, micro_batch_size: int, world: World
    ) -> None:
        self.windows_ST = windows_ST
        self.num_layers = checkpoint.num_layers
        self._reader = LayerReader(checkpoint, dtype, world.device)
        self._transfers = HostTransfers(world.device)
        self._dtype = dtype
        self._family = checkpoint.family
        self._units = checkpoint.units
        self._world = world
        batches = windows_ST.split(micro_batch_size)
        self.split = Split.of(batches)
        mine = {index: batches[index] for index in range(world.rank, len(batches), world.size)}
        self._hidden = self._reader.embed(mine)
        self._done = 0

    def layers(self, numbers: Iterable[int]) -> Iterator[tuple[int, nn.Module]]:
        """Yield the next layers with their numbers, the same on every rank; see ``HostTransfers.layers``."""
        return self._transfers.layers(self._reader, numbers)

    def advance(self, layer: nn.Module) -> None:
        """Run this rank's windows through a layer."""
        self._hidden.update(self._transfers.through(self._hidden.items(), partial(run, layer)))
        self._done += 1

    def advance_to(self, layer: nn.Module, units: Units) -> None:
        """Run this rank's windows into a layer, up to the residual stream before the block of some units."""
        reader = part_of(layer, units.block.reader)

        def first_part(hidden_BTC: Tensor) -> Tensor:
            return input_of(reader, partial(run, layer, hidden_BTC))

        self._hidden.update(self._transfers.through(self._hidden.items(), first_part))

    def advance_from(self, layer: nn.Module, mlp: Units) -> None:
        """Continue from ``advance_to``, if the units' block is the layer's MLP and a residual one, as
        ``require_residual`` checks; the same bits as ``advance``.
        """
        block, norm = mlp_of(layer, mlp), norm_before(layer, mlp)

        @torch.no_grad()
        def rest(residual_BTC: Tensor) -> Tensor:
            output_BTC: Tensor = residual_BTC + residual_update(layer, mlp, block(norm(residual_BTC)))
            return output_BTC

        self._hidden.update(self._transfers.through(self._hidden.items(), rest))
        self._done += 1

    def final_hidden(self) -> Iterator[tuple[int, Tensor]]:
        """Iterate over this rank's micro-batches as the head reads them after the last layer, [windows, tokens,
        hidden_size]; they leave the stream as they are iterated over.
        """
        norm = self._reader.final_norm()
        leaving = ((index, self._hidden.pop(index)) for index in list(self._hidden))
        return self._transfers.through(leaving, norm)

    def all_hidden(self) -> Mapping[int, Tensor]:
        """Micro-batch of this rank -> its current hidden states, on the CPU [windows, tokens, hidden_size]."""
        return dict(self._hidden)

    def standing(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the micro-batches' current hidden states on the device, one after another."""
        return self._transfers.to_device(self._hidden.items())

    def require_residual(self, layer: nn.Module, kinds: Sequence[Units]) -> None:
        """Check, on rank 0's first window, that a layer adds its blocks' outputs to its residual stream as expected.

        Args:
            kinds: the units whose blocks are checked, in the order of the blocks, the layer's last one at the end.

        Raises:
            UserError: if a block does not, e.g. because a norm follows its output projection.
        """
        if 0 not in self._hidden:
            return
        with ExitStack() as hooks:
            readers = [_seen(part_of(layer, units.block.reader), hooks) for units in kinds]
            blocks = [_seen(output_of(layer, units), hooks, outputs=True) for units in kinds]
            output_BTC = run(layer, self._hidden[0][:1].to(self._world.device))
        streams = [it.pop() for it in readers] + [output_BTC]
        for place, units in enumerate(kinds):
            found_BTC = streams[place] + residual_update(layer, units, blocks[place].pop())
            error = relative_error(*(it.flatten(0, 1).double() for it in (found_BTC, streams[place + 1])))
            what = (
                f"{self._family.model_type}: in layer {self._done}, the inputs of {units.block.reader} plus the "
                f"outputs of {units.output} depart from the hidden states that follow"
            )
            refuse_departure(error, TOLERANCES[self._dtype], what, "a method whose refit is dense or none works")

    def grams(
        self, number: int, layer: nn.Module, kinds: Sequence[Units], owner: int | None = None
    ) -> dict[str, list[Grams]]:
        """Run windows through a layer, and return Gram matrices of what its output projections of some kinds read.

        Args:
            owner: the only rank that needs them; on others, what is returned means nothing. None if all do.

        Returns:
            Kind of units -> Gram matrices of its channels in this layer: one for each expert, or a single one.

        Raises:
            UserError: as ``Float64Sum.of_all_ranks`` does.
        """
        sums = {
            units.kind: [
                GramSums(number, channels_of(layer, units), self.split, self._world) for _ in range(units.experts)
            ]
            for units in kinds
        }

        def add(index: int, units: Units, read: Any) -> None:
            for of_expert, vectors_ND in zip(sums[units.kind], read if units.experts > 1 else [read], strict=True):
                of_expert.add(index, vectors_ND)

        self._advance_reading(layer, kinds, add)
        grams = {kind: [it.means(owner) for it in of_kind] for kind, of_kind in sums.items()}
        self._done += 1
        return grams

    def channel_means(self, number: int, layer: nn.Module, kinds: Sequence[Units]) -> dict[str, Tensor]:
        """As ``grams``, but with means of what projections read, float64 [channels], on the device, on every rank."""
        sizes = {units.kind: output_of(layer, units).in_features for units in kinds}
        sums = {kind: Float64Sum(number, (size,), self._world) for kind, size in sizes.items()}

        def add(_index: int, units: Units, read_ND: Tensor) -> None:
            sums[units.kind].add(read_ND.sum(dim=0, dtype=torch.float64))

        self._advance_reading(layer, kinds, add)
        means = {kind: of_kind.of_all_ranks() / self.split.tokens for kind, of_kind in sums.items()}
        self._done += 1
        return means

    def _advance_reading(self, layer: nn.Module, kinds: Sequence[Units], take: TakeRead) -> None:
        """Run this rank's windows through a layer, and hand over what its output projections read on the way."""

        def outputs() -> Iterator[tuple[int, Tensor]]:
            for index, hidden_BTC in self.standing():
                with ExitStack() as observers:
                    seen = [observers.enter_context(channels_read(layer, units)) for units in kinds]
                    output_BTC = run(layer, hidden_BTC)
                for units, read in zip(kinds, seen, strict=True):
                    take(index, units, read.pop())
                yield index, output_BTC
                del hidden_BTC, output_BTC  # before the next are made

        self._hidden.update(self._transfers.to_host(outputs()))

    def squares(self, number: int, layer: nn.Module, names: Sequence[str]) -> dict[str, Tensor]:
        """Add up the squares of what some linear modules of a layer read, but stay before the layer; collective.

        Args:
            names: of the modules within the layer.

        Returns:
            Name -> float64 [channels], over all tokens of all ranks' windows, on the device.

        Raises:
            UserError: as ``Float64Sum.of_all_ranks`` does.
        """
        modules = [linear_of(layer, name) for name in names]
        sums = [Float64Sum(number, (it.in_features,), self._world) for it in modules]
        for _, hidden_BTC in self.standing():
            with ExitStack() as hooks:
                seen = [_seen(module, hooks) for module in modules]
                run(layer, hidden_BTC)
            for of_module, inputs in zip(sums, seen, strict=True):
                of_module.add(inputs.pop().flatten(0, -2).double().square().sum(dim=0))
            del hidden_BTC
        return {name: of_module.of_all_ranks() for name, of_module in zip(names, sums, strict=True)}


def _seen(module: nn.Module, hooks: ExitStack, *, outputs: bool = False) -> list[Tensor]:
    """Collect what goes into a module, or comes out of it, until the hooks are removed."""
    seen: list[Tensor] = []
    if outputs:
        handle = module.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    else:
        handle = module.register_forward_pre_hook(
            lambda _module, inputs, options: seen.append(read_by(inputs, options)), with_kwargs=True
        )
    hooks.callback(handle.remove)
    return seen
