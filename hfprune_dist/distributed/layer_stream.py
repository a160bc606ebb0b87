"""Windows of text on their way through a model, layer by layer, with each layer's Gram matrix added up on the way.

Layer after layer, a pass is compared with what the whole model computes for one window
(``distributed.whole_model_probe``).

Every rank holds the hidden states of its own windows and one layer at a time: memory for a layer, its Gram matrix and
the windows, whatever the model's size. Gram matrices are summed exactly, so they have the same bits on any number of
ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.exact_sums import ExactGram, ExactOverflowError
from hfprune_dist.core.gram import gram_matrix
from hfprune_dist.distributed.layer_states import LayerStates
from hfprune_dist.distributed.whole_model_probe import TOLERANCES, Guard, Probe, refuse_departure, relative_error
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import LayerReader, mlp_of, output_of, run

# Of so many micro-batches one is held out, to choose how much to trust the others.
HOLD_OUT_EVERY = 8
HIDDEN = "hidden"


@dataclass(frozen=True)
class Grams:
    """Mean of h h^T over tokens: float64, on the device, on every rank; h a layer's activations, or what else is asked.

    Attributes:
        fitted_DD: over the micro-batches that are fitted.
        held_out_DD: over those that are kept apart.
        held_out_share: of all tokens.
    """

    fitted_DD: Tensor
    held_out_DD: Tensor
    held_out_share: float

    def whole(self) -> Tensor:
        """Over all micro-batches, as large as each of both."""
        return self.fitted_DD.lerp(self.held_out_DD, self.held_out_share)


@dataclass(frozen=True)
class MlpIO:
    """A micro-batch at a layer's MLP, on the device.

    Attributes:
        input_NC: what the MLP reads [tokens, hidden_size].
        hidden_NK: what the units' output projection reads [tokens, channels].
        residual_NC: the residual stream that its output is added to, as input_NC.
    """

    input_NC: Tensor
    hidden_NK: Tensor
    residual_NC: Tensor


class LayerStream:
    """The windows of this rank, standing before one of the model's layers.

    Args:
        windows_ST: those of all ranks, int64 [samples, sequence_length].
        micro_batch_size: windows per forward.
        probe: what the model itself computes for one of the windows, which the stream must reproduce; None where
            layers won't be run as they are.

    Attributes:
        num_layers: of the model.

    Raises:
        UserError: where the model does more than look tokens up before its first layer; the same of what it does
            between layers from ``advance`` and ``grams``, and after them from ``final_hidden``.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        windows_ST: Tensor,
        dtype: torch.dtype,
        micro_batch_size: int,
        world: World,
        *,
        probe: Probe | None = None,
    ) -> None:
        self.windows_ST = windows_ST
        self.num_layers = checkpoint.num_layers
        self._reader = LayerReader(checkpoint, dtype, world.device)
        self._dtype = dtype
        self._family = checkpoint.family
        self._units = checkpoint.units
        self._world = world
        batches = windows_ST.split(micro_batch_size)
        self._count = len(batches)
        self._tokens: int = windows_ST.numel()
        self._held_out_tokens: int = sum(b.numel() for i, b in enumerate(batches) if is_held_out(i, self._count))
        self._hidden = self._reader.embed(
            {index: batches[index] for index in range(world.rank, self._count, world.size)}
        )
        self._done = 0
        model_type = self._family.model_type
        self._guard = None if probe is None else Guard(probe, windows_ST, micro_batch_size, model_type, world)
        self._check()

    def layer(self, number: int) -> nn.Module:
        """The next layer; the same number on every rank."""
        return self._reader.layer(number)

    def advance(self, layer: nn.Module) -> None:
        """Run this rank's windows through a layer."""
        for index, hidden_BTC in self._hidden.items():
            self._hidden[index] = run(layer, hidden_BTC.to(self._world.device)).cpu()
        self._step()

    def states_in(self, folder: Path) -> LayerStates:
        """Where ``save`` and ``resume`` keep the stream."""
        return LayerStates(folder, range(self._count), self._world)

    def save(self, states: LayerStates) -> None:
        """Keep the windows where they stand; collective."""
        states.save(self._done, {index: {HIDDEN: hidden_BTC} for index, hidden_BTC in self._hidden.items()})

    def resume(self, states: LayerStates) -> int:
        """Go on where an earlier attempt was saved; returns the number of layers that are done. Collective."""
        done, saved = states.newest()
        if done:
            self._hidden = {index: named[HIDDEN] for index, named in saved.items()}
            self._done = done
            self._check()
        return self._done

    def final_hidden(self) -> Iterator[tuple[int, Tensor]]:
        """After the last layer, what the head reads: micro-batches of this rank, each [windows, tokens, hidden_size].

        They leave the stream, one at a time.
        """
        norm = self._reader.final_norm()
        if self._guard is not None:
            mine = self._hidden.keys() & {self._guard.micro_batch}
            normed = {index: norm(self._hidden[index].to(self._world.device)) for index in mine}
            self._guard.check(self._done + 1, normed)
        for index in list(self._hidden):
            yield index, norm(self._hidden.pop(index).to(self._world.device)).cpu()

    @property
    def micro_batches(self) -> int:
        """Of all ranks together."""
        return self._count

    @property
    def tokens(self) -> int:
        """Of all ranks together."""
        return self._tokens

    @property
    def fitted_tokens(self) -> int:
        """Of all ranks, in micro-batches that are not held out; where there is one micro-batch alone, it is both."""
        return self._tokens - self._held_out_tokens

    def hidden(self, index: int) -> Tensor:
        """The hidden states of one of this rank's micro-batches before the next layer, on the CPU."""
        return self._hidden[index]

    def around_mlp(self, layer: nn.Module) -> Iterator[tuple[int, MlpIO]]:
        """What is around the layer's MLP, for every micro-batch of this rank; the stream stays before the layer."""
        norm = layer.get_submodule(f"layers.0.{self._family.mlp_norm}")
        modules = mlp_of(layer), output_of(layer, self._units), norm
        for index, hidden_BTC in self._hidden.items():
            with ExitStack() as observers:
                seen = [observers.enter_context(_observed(module)) for module in modules]
                run(layer, hidden_BTC.to(self._world.device))
            yield index, MlpIO(*(inputs[0].flatten(0, 1) for inputs in seen))

    def require_residual_mlp(self, layer: nn.Module) -> None:
        """Check that a layer puts out what ``around_mlp`` calls its residual stream, plus its MLP's output; collective.

        Raises:
            UserError: where it does not, e.g. since a norm follows the MLP.
        """
        error = None
        if 0 in self._hidden:
            norm = layer.get_submodule(f"layers.0.{self._family.mlp_norm}")
            mlp_outputs: list[Tensor] = []
            handle = mlp_of(layer).register_forward_hook(lambda _module, _inputs, output: mlp_outputs.append(output))
            with _observed(norm) as residuals:
                output_BTC = run(layer, self._hidden[0].to(self._world.device))
            handle.remove()
            error = relative_error(*(it.flatten(0, 1).double() for it in (residuals[0] + mlp_outputs[0], output_BTC)))
        what = (
            f"{self._family.model_type}: in layer {self._done}, the inputs of {self._family.mlp_norm} plus the MLP's "
            "outputs depart from the layer's outputs"
        )
        error = self._world.broadcast(error, 0)
        refuse_departure(error, TOLERANCES[self._dtype], what, "a method whose refit is dense or none works")

    def grams(self, number: int, layer: nn.Module) -> Grams:
        """Add up Gram matrices of the layer's activations, and advance on the way.

        Raises:
            UserError: as ``grams_of`` and ``advance`` do.
        """
        output_projection = output_of(layer, self._units)

        def activations() -> Iterator[tuple[int, Tensor]]:
            for index, hidden_BTC in list(self._hidden.items()):
                with _observed(output_projection) as seen:
                    output_BTC = run(layer, hidden_BTC.to(self._world.device))
                yield index, seen[0].flatten(0, 1)
                self._hidden[index] = output_BTC.cpu()

        grams = self.grams_of(number, output_projection.in_features, activations())
        self._step()
        return grams

    def _step(self) -> None:
        """The stream stands before the next layer; check the one behind it."""
        self._done += 1
        self._check()

    def _check(self) -> None:
        if self._guard is not None:
            self._guard.check(self._done, self._hidden)

    def grams_of(self, number: int, size: int, vectors: Iterable[tuple[int, Tensor]]) -> Grams:
        """Add up Gram matrices of vectors over all windows of all ranks.

        Args:
            number: of the layer, for messages.
            size: of a vector.
            vectors: (micro-batch of this rank, its vectors [tokens, size]).

        Raises:
            UserError: where activations are NaN, infinite or out of all proportion.
        """
        sums: tuple[ExactGram, ExactGram] | None = None
        for index, vectors_ND in vectors:
            term_DD = gram_matrix(vectors_ND.float())
            sums = sums or self._empty_sums(term_DD.diagonal())
            try:
                sums[is_held_out(index, self._count)].add(term_DD)
            except ExactOverflowError as error:
                raise unusable(number, error) from None
            del term_DD  # a quarter of both sums, while the next one is made
        fitted, held_out = sums or self._empty_sums(torch.zeros(size))  # a rank without windows takes part all the same
        return self._means(self._of_all_ranks(fitted), self._of_all_ranks(held_out))

    def _of_all_ranks(self, own: ExactGram) -> Tensor:
        self._world.add_up(own.total_DD)
        return own.value()

    def _empty_sums(self, diagonal_D: Tensor) -> tuple[ExactGram, ExactGram]:
        """Of fitted and of held-out micro-batches, at the scale of the first rank's first term."""
        first_D = self._of_first_rank(diagonal_D)
        return ExactGram(first_D, self._count), ExactGram(first_D, self._count)

    def _of_first_rank(self, diagonal_D: Tensor) -> Tensor:
        shared_D = diagonal_D.double().cpu()
        self._world.broadcast_tensor(shared_D, 0)
        return shared_D.to(self._world.device)

    def _means(self, fitted_DD: Tensor, held_out_DD: Tensor) -> Grams:
        fitted_DD.div_(self.fitted_tokens)
        if not self._held_out_tokens:
            return Grams(fitted_DD, fitted_DD, 0.0)
        share = self._held_out_tokens / self._tokens
        return Grams(fitted_DD, held_out_DD.div_(self._held_out_tokens), share)


def unusable(number: int, error: ExactOverflowError) -> UserError:
    """What to tell of sums over a layer's activations that can't be made."""
    return UserError(f"activations of layer {number}: {error}; check the checkpoint's weights")


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
