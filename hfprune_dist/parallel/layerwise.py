"""Calibration windows on their way through a model, layer by layer, with each layer's Gram matrix added up on the way.

Every rank holds the hidden states of its own windows and one layer at a time: memory for a layer, its Gram matrix and
the windows, whatever the model's size. Gram matrices are summed exactly, so they have the same bits on any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hfprune_dist.core.exact import ExactGram, ExactOverflowError
from hfprune_dist.errors import UserError
from hfprune_dist.models.checkpoint import Checkpoint
from hfprune_dist.models.layers import LayerReader, mlp_of, run
from hfprune_dist.parallel.world import World

# Of so many micro-batches one is held out, to choose how much to trust the others.
HOLD_OUT_EVERY = 8


@dataclass(frozen=True)
class Grams:
    """Mean of h h^T over tokens, h the input of a layer's down projection: float64, on the device, on every rank."""

    fitted_DD: Tensor
    held_out_DD: Tensor
    whole_DD: Tensor


class LayerStream:
    """The calibration windows of this rank, standing before one of the model's layers.

    Args:
        windows_ST: all calibration windows, int64 [samples, sequence_length].
        micro_batch_size: windows per forward.
    """

    def __init__(
        self, checkpoint: Checkpoint, windows_ST: Tensor, dtype: torch.dtype, micro_batch_size: int, world: World
    ) -> None:
        self._reader = LayerReader(checkpoint, dtype, world.device)
        self._down_projection = checkpoint.family.down_projection
        self._world = world
        batches = windows_ST.split(micro_batch_size)
        self._count = len(batches)
        self._tokens = windows_ST.numel()
        self._held_out_tokens = sum(b.numel() for i, b in enumerate(batches) if is_held_out(i, self._count))
        self._hidden = {
            index: self._reader.embed(batches[index]) for index in range(world.rank, self._count, world.size)
        }

    def layer(self, number: int) -> nn.Module:
        """The next layer; the same number on every rank."""
        return self._reader.layer(number)

    def advance(self, layer: nn.Module) -> None:
        """Run this rank's windows through a layer."""
        for index, hidden_BTC in self._hidden.items():
            self._hidden[index] = run(layer, hidden_BTC.to(self._world.device)).cpu()

    def final_hidden(self) -> Iterator[tuple[int, Tensor]]:
        """After the last layer, what the head reads: micro-batches of this rank, each [windows, tokens, hidden_size].

        They leave the stream, one at a time.
        """
        norm = self._reader.head().norm
        for index in list(self._hidden):
            yield index, norm(self._hidden.pop(index).to(self._world.device)).cpu()

    @property
    def micro_batches(self) -> int:
        """Of all ranks together."""
        return self._count

    def mlp_inputs(self, layer: nn.Module) -> dict[int, Tensor]:
        """What the layer's MLP reads: micro-batch of this rank -> [tokens, hidden_size] on the CPU."""
        inputs = {}
        for index, hidden_BTC in self._hidden.items():
            with _observed(mlp_of(layer)) as seen:
                run(layer, hidden_BTC.to(self._world.device))
            inputs[index] = seen[0].flatten(0, 1).cpu()
        return inputs

    def grams(self, number: int, layer: nn.Module, advance: bool) -> Grams:
        """Add up a layer's Gram matrices over all windows of all ranks; on the way advance, or stay before the layer.

        Raises:
            UserError: where activations are NaN, infinite or out of all proportion.
        """
        down_projection = mlp_of(layer).get_submodule(self._down_projection)
        fitted = held_out = None
        for index, hidden_BTC in self._own_or_first():
            with _observed(down_projection) as seen:
                output_BTC = run(layer, hidden_BTC.to(self._world.device))
            hidden_ND = seen[0].flatten(0, 1).float()
            term_DD = hidden_ND.T @ hidden_ND
            if fitted is None or held_out is None:
                diagonal_D = self._of_first_rank(term_DD.diagonal())
                fitted, held_out = ExactGram(diagonal_D, self._count), ExactGram(diagonal_D, self._count)
            if index not in self._hidden:
                continue  # another rank's, run for its shape alone
            try:
                (held_out if is_held_out(index, self._count) else fitted).add(term_DD)
            except ExactOverflowError as error:
                raise UserError(f"activations of layer {number}: {error}; check the checkpoint's weights") from None
            if advance:
                self._hidden[index] = output_BTC.cpu()
        assert fitted is not None and held_out is not None
        self._world.add_up(fitted.total_DD)
        self._world.add_up(held_out.total_DD)
        return self._means(fitted.value(), held_out.value())

    def _own_or_first(self) -> Iterator[tuple[int, Tensor]]:
        """The micro-batches of this rank; a rank without any borrows zeros, so that it can take part in the sums."""
        if self._hidden:
            yield from list(self._hidden.items())
        else:
            yield -1, self._reader.embed(torch.zeros(1, 1, dtype=torch.int64))

    def _of_first_rank(self, diagonal_D: Tensor) -> Tensor:
        shared_D = diagonal_D.double().cpu()
        self._world.broadcast_tensor(shared_D, 0)
        return shared_D.to(self._world.device)

    def _means(self, fitted_DD: Tensor, held_out_DD: Tensor) -> Grams:
        whole_DD = (fitted_DD + held_out_DD) / self._tokens
        if not self._held_out_tokens:
            return Grams(whole_DD, whole_DD, whole_DD)
        fitted_tokens = self._tokens - self._held_out_tokens
        return Grams(fitted_DD / fitted_tokens, held_out_DD / self._held_out_tokens, whole_DD)


def is_held_out(index: int, count: int) -> bool:
    """Whether a micro-batch, one of ``count``, is kept apart from those that are fitted."""
    every = min(HOLD_OUT_EVERY, count)
    return count > 1 and index % every == every - 1


@contextmanager
def _observed(module: nn.Module) -> Iterator[list[Tensor]]:
    """Collects what goes into a module."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    try:
        yield seen
    finally:
        handle.remove()
