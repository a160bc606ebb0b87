"""Divergence of pruned models from the dense one, layer by layer: of shapes with a cheap refit, many in one pass, or of
a model that has been refitted.

Memory holds one layer, and the windows' hidden states for each shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.devices import send
from hfprune_dist.core.fidelity import divergences
from hfprune_dist.distributed.layer_stream import AfterLayer, LayerStream, States
from hfprune_dist.distributed.sums import is_held_out
from hfprune_dist.errors import UserError
from hfprune_dist.models.single_layer import LayerReader, put_weights, run, weights_kept
from hfprune_dist.refit.cheap_fits import Scored, cheap_fits
from hfprune_dist.structures.kept import Kept, Shape

# Most tokens that pass a layer together, those of several shapes' windows; but at least one window does.
AT_ONCE = 2**10
# What a layer keeps: the number of units of each kind; None if it goes.
Size = tuple[int, ...] | None


class PrunedLayers:
    """The layers of a pruned model that isn't written yet.

    Args:
        kept: what stays of the checkpoint.
        replacements: name of a tensor of the checkpoint -> function that reads what the pruned model has in its place.
        reader: makes the checkpoint's layers.
    """

    def __init__(
        self, checkpoint: Checkpoint, kept: Kept, replacements: Mapping[str, Callable[[], Tensor]], reader: LayerReader
    ) -> None:
        self.checkpoint = checkpoint
        self.kept = kept
        self._replacements = replacements
        self._reader = reader

    def layers(self, numbers: Iterable[int]) -> Iterator[tuple[int, nn.Module]]:
        """Yield layers that stay, with their numbers in the dense model; see ``LayerReader.layers``."""
        for number, layer in self._reader.layers(numbers):
            for kind in self.kept.units:
                units, kept = self.checkpoint.structures[kind], self.kept.of_layer(number, kind)
                put_weights(layer, weights_kept(layer, units, kept))
            prefix = f"{self.checkpoint.family.layers}.{number}."
            new = {name.removeprefix(prefix): it for name, it in self._replacements.items() if name.startswith(prefix)}
            put_weights(layer, {name: read().to(self._reader.device, self._reader.dtype) for name, read in new.items()})
            yield number, layer
            del layer


def measure_shapes(
    shapes: Sequence[Shape],
    kinds: Sequence[Scored],
    fitted_on: LayerStream | None,
    stream: LayerStream,
    dense: States,
    after_each: AfterLayer,
    *,
    every: int = 1,
) -> list[float]:
    """Each shape's ``mean_divergences`` from the dense model after a cheap refit; raises as that and ``cheap_fits``.

    Args:
        kinds: of the units that go.
        fitted_on: windows before the first layer, on which output projections are fitted; None to keep their weights.
        stream: the windows before the first layer on which shapes are compared.
    """
    device, sizes = stream.world.device, list[tuple[Size, ...]]()
    names = [scored.units.kind for scored in kinds]
    for shape in shapes:
        staying = dict(zip(shape.layers, zip(*(shape.units[name] for name in names), strict=True), strict=True))
        sizes.append(tuple(staying.get(layer) for layer in range(stream.num_layers)))
    at_once = max(1, AT_ONCE // stream.windows_ST.shape[1])
    # Shapes share their states up to the first layer in which they differ: sizes of the layers so far -> states.
    branches: dict[tuple[Size, ...], States] = {(): stream.states}
    for number, layer in stream.reader.layers(range(stream.num_layers)):
        following = dict.fromkeys(size[: number + 1] for size in sizes)
        there = sorted({so_far[-1] for so_far in following if so_far[-1] is not None})
        fits = cheap_fits(number, layer, kinds, there, fitted_on, stream.world)
        advanced = {so_far: branches[so_far[:-1]] for so_far in following if so_far[-1] is None}
        for size in there:
            put_weights(layer, fits[size])
            alike = [so_far for so_far in following if so_far[-1] == size]
            for start in range(0, len(alike), at_once):
                some = alike[start : start + at_once]
                advanced |= {so_far: {} for so_far in some}
                for index, hidden_BTC in stream.states.items():
                    entering = torch.cat([send(branches[so_far[:-1]][index], device) for so_far in some])
                    for so_far, reached_BTC in zip(some, run(layer, entering).split(len(hidden_BTC)), strict=True):
                        advanced[so_far][index] = stream.keep(reached_BTC)
        branches = advanced
        del layer, fits
        after_each(number + 1)
    found = dict(zip(branches, mean_divergences(stream, dense, list(branches.values()), every=every), strict=True))
    return [found[size] for size in sizes]


def mean_divergences(stream: LayerStream, dense: States, models: Sequence[States], *, every: int = 1) -> list[float]:
    """KL(dense || model) per token of a stream's windows, in nats, for each of several models; collective.

    Args:
        dense: what the dense model's head reads for these windows, or for more or longer ones, on the CPU.
        models: what their last layers put out.
        every: one token in this many is compared. With a large vocabulary, logits cost more than all layers.

    Raises:
        UserError: if one is NaN or infinite.
    """
    head, device = stream.reader.head(), stream.world.device
    totals = torch.zeros(len(models), dtype=torch.float64)
    tokens = slice(None, stream.windows_ST.shape[1], every)
    for index in stream.states:
        reached = [head.outputs(head.norm(send(hidden[index], device)[:, tokens])) for hidden in models]
        wanted = head.outputs(send(dense[index], device)[:, tokens])
        totals += torch.tensor(divergences(wanted, reached), dtype=torch.float64)
    stream.world.all_reduce(totals)
    if strange := int((~totals.isfinite()).sum()):
        raise UserError(
            f"{strange} of {len(models)} shapes can't be compared: their outputs, or the dense model's, are NaN or "
            "infinite; set importance.dtype=float32 if it isn't yet, else check the checkpoint's weights"
        )
    return [float(total) / stream.windows_ST[:, tokens].numel() for total in totals]


def held_out_windows(windows_ST: Tensor, micro_batch_size: int, most: int) -> Tensor:
    """The first windows among those that refits hold out to choose their ridge, up to ``most``, but at least one
    micro-batch; there must be at least two of them.
    """
    batches = windows_ST.split(micro_batch_size)
    held_out = [batch for index, batch in enumerate(batches) if is_held_out(index, len(batches))]
    return torch.cat(held_out[: max(1, most // micro_batch_size)])
