"""Refits on the dense model's activations: layers don't wait for each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from hfprune_dist.core.selection import entries_of
from hfprune_dist.distributed.gram_sums import Grams
from hfprune_dist.distributed.interruption import Interrupted
from hfprune_dist.distributed.layer_stream import LayerStream
from hfprune_dist.distributed.turns import Turns
from hfprune_dist.distributed.world import World
from hfprune_dist.models.single_layer import output_of
from hfprune_dist.refit.least_squares_fit import solve
from hfprune_dist.refit.refitted_layers import RefittedLayers
from hfprune_dist.structures.kept import Kept

# Called on every rank with the number of layers that are done.
AfterEach = Callable[[int], None]


@dataclass(frozen=True)
class _Unsolved:
    """A layer that waits to be solved.

    Attributes:
        weights, grams: kind of units -> its output projection's weight, and Gram matrices of what that reads.
    """

    number: int
    weights: dict[str, Tensor]
    grams: dict[str, Grams]


class DenseRefit:
    """Output projections that make their dense outputs of the kept channels of the dense model's activations.

    Args:
        kept: what stays of the model.
        stream: its windows before the first layer.
        fitted: where layers are written; its kinds of units say which output projections are fitted.
    """

    def __init__(self, kept: Kept, stream: LayerStream, fitted: RefittedLayers, world: World) -> None:
        self._kept = kept
        self._kinds = fitted.kinds
        self._stream = stream
        self._fitted = fitted
        self._world = world

    def run(self, after_each: AfterEach) -> None:
        """Refit all layers that stay and are not done; where it is interrupted, ranks first solve what waits.

        Raises:
            UserError: as ``LayerStream.grams`` does.
        """
        done = self._world.broadcast(self._fitted.done(self._kept.layers) if self._world.is_first else set())
        left = [number for number in self._kept.layers if number not in done]
        turns = Turns(left, self._world, self._solve)
        try:
            for number, layer in self._stream.layers(range(left[-1] + 1 if left else 0)):
                if number in left:
                    turns.add(number, self._prepared(number, layer, turns.is_mine(number)))
                else:
                    self._stream.advance(layer)
                del layer
                after_each(number + 1)
        except Interrupted:
            turns.finish()
            raise

    def _prepared(self, number: int, layer: nn.Module, is_mine: bool) -> _Unsolved | None:
        """What it takes to solve a layer, once the stream is past it."""
        grams = self._stream.grams(number, layer, self._kinds)
        weights = {units.kind: output_of(layer, units).weight.data for units in self._kinds}
        return _Unsolved(number, weights, grams) if is_mine else None

    def _solve(self, unsolved: _Unsolved) -> None:
        tensors, fits = {}, {}
        for units in self._kinds:
            weight_CD = unsolved.weights[units.kind]
            kept_U = self._kept.of_layer(unsolved.number, units.kind)
            channels_K = entries_of(kept_U, units.channels_per_unit).to(weight_CD.device)
            solution = solve(weight_CD, unsolved.grams[units.kind], channels_K)
            tensors[f"{units.output}.weight"] = solution.whole_CK
            fits[units.kind] = solution.fit
        self._fitted.write(unsolved.number, tensors, fits)
