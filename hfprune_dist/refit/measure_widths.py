"""How far models of many widths are from the dense one, measured in one pass layer by layer.

A width is the number of units that a layer keeps.

The windows go through the dense layers and, beside them, through every candidate's: candidates share all layers up to
the first in which their widths differ. Memory is that of one layer and of the windows' hidden states of each candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.core.fidelity import compare_outputs, next_ids
from hfprune_dist.core.least_squares import LeastSquares, best_ridge
from hfprune_dist.core.selection import entries_of, top_units
from hfprune_dist.core.width_search import Widths
from hfprune_dist.distributed.layer_states import LayerStates, Named
from hfprune_dist.distributed.layer_stream import Grams, LayerStream, is_held_out
from hfprune_dist.distributed.whole_model_probe import Probe
from hfprune_dist.distributed.world import World
from hfprune_dist.models.single_layer import LayerReader, output_of, put_weights, run, weights_kept
from hfprune_dist.store.atomic_files import read_json, set_aside, write_json
from hfprune_dist.store.hashing import digest_of

# On so many calibration windows candidates are compared: of those that refits keep apart to choose their ridge.
WINDOWS = 8

KNOWN = "search.json"

# Candidates that have had the same widths so far -> micro-batch of this rank -> its hidden states, on the CPU.
Branches = dict[tuple[int, ...], dict[int, Tensor]]
# Of what units own in a layer, by names within it.
Weights = dict[str, Tensor]


class Measurement:
    """Measures candidates on the windows of all ranks; the same bits on any number of them.

    Args:
        scores: of each layer's units; a layer keeps the highest.
        refit: whether output projections are fitted to the dense activations, on the windows that are not held out.
        windows_ST: all calibration windows, int64 [samples, sequence_length].
        micro_batch_size: windows per forward.
        probe: what the model itself computes for one of the windows.
        folder: for a later attempt: what was measured, and where a measurement stands.
        after_each: called on every rank with the number of layers that are done, those of all measurements so far.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        scores: Sequence[Tensor],
        windows_ST: Tensor,
        *,
        refit: bool,
        dtype: torch.dtype,
        micro_batch_size: int,
        world: World,
        probe: Probe,
        folder: Path,
        after_each: Callable[[int], None],
    ) -> None:
        self._checkpoint = checkpoint
        self._units = checkpoint.units
        self._scores = scores
        self._refit = refit
        self._windows_ST = windows_ST
        self._dtype = dtype
        self._micro_batch_size = micro_batch_size
        self._world = world
        self._probe = probe
        self._folder = folder
        self._after_each = after_each
        self._known: dict[str, float] = world.broadcast(_read_known(folder / KNOWN) if world.is_first else {})
        self._measurements = 0
        self._reader = LayerReader(checkpoint, dtype, world.device)
        batches = windows_ST.split(micro_batch_size)
        held_out = [it for it in range(len(batches)) if is_held_out(it, len(batches))] or [0]
        chosen = held_out[: max(1, WINDOWS // micro_batch_size)]
        self._chosen = chosen
        self._batches = {index: batches[index] for index in chosen[world.rank :: world.size]}

    def kl(self, candidates: Sequence[Widths]) -> list[float]:
        """KL(dense || candidate) per token, nats, of every candidate; the same candidate is measured once."""
        unknown = [widths for widths in candidates if digest_of(widths) not in self._known]
        if unknown:
            kls = self._measure(unknown)
            self._known |= {digest_of(widths): kl for widths, kl in zip(unknown, kls, strict=True)}
            if self._world.is_first:
                write_json(self._folder / KNOWN, self._known)
            self._states(unknown).discard()
        self._measurements += 1
        return [self._known[digest_of(widths)] for widths in candidates]

    def _states(self, candidates: Sequence[Widths]) -> LayerStates:
        """Where a measurement of these candidates stands."""
        return LayerStates(self._folder / f"search-{digest_of(candidates)[:16]}", self._chosen, self._world)

    def _measure(self, candidates: Sequence[Widths]) -> list[float]:
        """Saved after each layer; goes on after the last one that was saved."""
        states = self._states(candidates)
        everyone = [tuple(len(scores_D) for scores_D in self._scores), *candidates]
        num_layers = self._checkpoint.num_layers
        done, saved = states.newest()
        branches = _unpacked(saved, [widths[:done] for widths in everyone])
        if not done:
            branches = {tuple(range(len(everyone))): self._reader.embed(self._batches)}
        stream = self._stream()
        for number in range(num_layers if done < num_layers else 0):
            layer = self._reader.layer(number)
            if number < done:
                stream.advance(layer)
            else:
                branches = self._through(stream, number, layer, branches, [widths[number] for widths in everyone])
                states.save(number + 1, _packed(branches, self._batches))
            self._after_each(self._measurements * num_layers + number + 1)
        return self._compared(branches, len(everyone))[1:]

    def _through(
        self, stream: LayerStream, number: int, layer: nn.Module, branches: Branches, widths: Sequence[int]
    ) -> Branches:
        """Take the dense windows and every branch through a layer; ``widths`` are the candidates' there."""
        grams = self._grams(stream, number, layer)
        weights = self._weights(number, layer, sorted(set(widths)), grams)
        del grams  # hidden states go on without them
        return self._advance(layer, weights, _split(branches, widths))

    def _stream(self) -> LayerStream:
        """Windows on their way through the dense layers: those of the refit, or the probe's micro-batch alone."""
        windows_ST = self._windows_ST
        if not self._refit:
            row = self._probe.row_in(windows_ST)
            assert row is not None
            windows_ST = windows_ST.split(self._micro_batch_size)[row // self._micro_batch_size]
        where = self._checkpoint, windows_ST, self._dtype, self._micro_batch_size, self._world
        return LayerStream(*where, probe=self._probe)

    def _grams(self, stream: LayerStream, number: int, layer: nn.Module) -> Grams | None:
        """Take the stream through a layer; what a refit needs of it."""
        if self._refit:
            return stream.grams(number, layer)
        stream.advance(layer)
        return None

    def _weights(self, number: int, layer: nn.Module, widths: Sequence[int], grams: Grams | None) -> dict[int, Weights]:
        """What the layer's units own at every width; ranks share the solving."""
        dense_width = len(self._scores[number])
        narrower = [width for width in widths if width < dense_width]
        kept = {width: top_units(self._scores[number], width) for width in narrower}
        fitted = self._fitted(layer, kept, grams) if grams is not None and narrower else {}
        weights = {dense_width: weights_kept(layer, self._units)}
        for width in narrower:
            weights[width] = weights_kept(layer, self._units, kept[width])
            if width in fitted:
                name = f"{self._units.output}.weight"
                weights[width][name] = fitted[width].to(weights[width][name])
        return weights

    def _fitted(self, layer: nn.Module, kept: Mapping[int, Tensor], grams: Grams) -> dict[int, Tensor]:
        """The output projection for every width, fitted on the windows that are not held out; one ridge for all."""
        weight_CD = output_of(layer, self._units).weight.data.double()
        channels = {width: entries_of(kept_K, self._units.channels_per_unit) for width, kept_K in kept.items()}
        on_device = {width: channels_K.to(weight_CD.device) for width, channels_K in channels.items()}
        narrowest_K = on_device[min(on_device)]
        ridge = 0.0
        if self._world.is_first:
            held_out = LeastSquares(weight_CD, grams.held_out_DD, narrowest_K)
            ridge, _ = best_ridge(LeastSquares(weight_CD, grams.fitted_DD, narrowest_K), held_out)
        ridge = self._world.broadcast(ridge)
        mine = {
            width: LeastSquares(weight_CD, grams.fitted_DD, channels_K).weight(ridge).float().cpu()
            for place, (width, channels_K) in enumerate(on_device.items())
            if place % self._world.size == self._world.rank
        }
        return {width: weight for share in self._world.gather(mine) for width, weight in share.items()}

    def _advance(self, layer: nn.Module, weights: Mapping[int, Weights], branches: Mapping[int, Branches]) -> Branches:
        """Run every branch through the layer at its width."""
        advanced: Branches = {}
        for width, at_width in branches.items():
            put_weights(layer, weights[width])
            for members, hidden in at_width.items():
                advanced[members] = {
                    index: run(layer, hidden_BTC.to(self._world.device)).cpu() for index, hidden_BTC in hidden.items()
                }
        return advanced

    def _compared(self, branches: Branches, count: int) -> list[float]:
        """Divergence of every candidate from the first, added up in the order of the micro-batches."""
        head = self._reader.head()
        reference = next(hidden for members, hidden in branches.items() if 0 in members)
        own: dict[tuple[int, int], float] = {}
        for members, hidden in branches.items():
            for index, hidden_BTC in hidden.items():
                following_N = torch.cat([next_ids(ids_T) for ids_T in self._batches[index]]).to(self._world.device)
                dense, model = (head.outputs(it.to(self._world.device)) for it in (reference[index], hidden_BTC))
                sums = compare_outputs(dense, model, following_N)
                own |= {(member, index): sums.kl for member in members}
        everywhere = {key: value for share in self._world.gather(own) for key, value in share.items()}
        tokens = sum(self._world.gather(sum(ids.numel() for ids in self._batches.values())))
        totals = [0.0] * count
        for member, index in sorted(everywhere):
            totals[member] += everywhere[member, index]
        return [total / tokens for total in totals]


def _packed(branches: Branches, indices: Iterable[int]) -> dict[int, dict[str, Tensor]]:
    """The same by micro-batch; a branch's name is its candidates' numbers."""
    return {index: {_name(members): hidden[index] for members, hidden in branches.items()} for index in indices}


def _unpacked(saved: Mapping[int, Named], so_far: Sequence[Widths]) -> Branches:
    """What ``_packed`` was given; ``so_far`` are the candidates' widths in the layers that are done."""
    together: dict[Widths, list[int]] = {}
    for member, widths in enumerate(so_far):
        together.setdefault(widths, []).append(member)
    return {
        tuple(members): {index: named[_name(members)] for index, named in saved.items()}
        for members in together.values()
    }


def _name(members: Sequence[int]) -> str:
    return ",".join(map(str, members))


def _read_known(file: Path) -> dict[str, float]:
    """What earlier attempts measured; a file that is damaged is set aside."""
    try:
        known: dict[str, float] | None = read_json(file)
    except ValueError as error:
        set_aside(file, f"is cut short or not JSON ({error})")
        return {}
    return known or {}


def _split(branches: Branches, widths: Sequence[int]) -> dict[int, Branches]:
    """Width -> the branches that go on with it; ``widths`` are the candidates' in the next layer."""
    split: dict[int, Branches] = {}
    for members, hidden in branches.items():
        for width in sorted({widths[member] for member in members}):
            staying = tuple(member for member in members if widths[member] == width)
            split.setdefault(width, {})[staying] = dict(hidden)
    return split
