"""Charts of the units that checkpoints keep: how many in each layer, and how many methods keep in common."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

from hfprune_dist.checkpoints.kept_numbers import read_kept_numbers
from hfprune_dist.errors import UserError
from hfprune_dist.report.chart import (
    Chart,
    Figure,
    Key,
    Trace,
    axis,
    band,
    dash,
    dashes_told,
    line,
    method_key,
    percent_of,
    row_name,
    shown,
)
from hfprune_dist.report.evidence import Evidence
from hfprune_dist.store.stage import CUTTING, kind_of

TITLES = {
    "neurons": "neurons",
    "expert_neurons": "neurons of experts",
    "shared_neurons": "neurons of shared experts",
    "experts": "experts",
    "kv_groups": "key-value heads",
}
NOTHING_PRUNED = "No model has been pruned yet."


@dataclass(frozen=True)
class KeptUnits:
    """The units of one kind that a checkpoint keeps: layer -> their indices, as the bits of an integer."""

    layers: Mapping[int, int]

    def counts(self, layers: int) -> list[int]:
        """Number of units kept in each of a model's layers; 0 if the layer was removed."""
        return [self.layers.get(layer, 0).bit_count() for layer in range(layers)]

    def common_share(self, other: KeptUnits) -> float:
        """Share of the units kept by either checkpoint that both keep."""
        layers = self.layers.keys() | other.layers.keys()
        pairs = [(self.layers.get(layer, 0), other.layers.get(layer, 0)) for layer in layers]
        union = sum((ours | theirs).bit_count() for ours, theirs in pairs)
        return sum((ours & theirs).bit_count() for ours, theirs in pairs) / union


@dataclass(frozen=True)
class Pruned:
    """A pruned checkpoint."""

    model: str
    ratio: float
    method: str
    recovery: str
    units: Mapping[str, KeptUnits]


def layer_charts(evidence: Evidence) -> list[Chart]:
    """The charts of widths and heads by layer, and of the overlap between the units that methods keep."""
    pruned = [*_pruned(evidence)]
    return [_sizes(evidence, pruned), _overlap(evidence, pruned)]


def _pruned(evidence: Evidence) -> Iterator[Pruned]:
    for stage, _ in evidence.finished(*CUTTING):
        # A cell also depends on the stages of earlier rounds; only the one of the last round counts.
        cells = [cell for cell in evidence.cells_of(stage.id) if _last_pruning(cell.producers) == stage.id]
        kept = _kept(evidence.store.handle(stage.id).artifact)
        if cells and kept:
            first = cells[0]
            yield Pruned(first.model, first.ratio or 0.0, first.method or "", first.recovery, kept)


def _last_pruning(producers: Sequence[str]) -> str:
    return [stage_id for stage_id in producers if kind_of(stage_id) in CUTTING][-1]


def _kept(artifact: Path) -> Mapping[str, KeptUnits]:
    """Kind -> the kept units; none if ``kept.json`` can't be read, without which the rest of the page can be drawn."""
    try:
        return _read(artifact)
    except (UserError, OSError, ValueError, LookupError, TypeError, AttributeError):
        return {}


@cache
def _read(artifact: Path) -> Mapping[str, KeptUnits]:
    """Kind -> kept units, from an artifact's ``kept.json``. Artifacts never change, so each is read only once."""
    layers, units = read_kept_numbers(artifact)
    return {kind: KeptUnits(dict(zip(layers, map(_bits, rows), strict=True))) for kind, rows in units.items()}


def _bits(numbers: Sequence[int]) -> int:
    bits = bytearray(max(numbers, default=0) // 8 + 1)
    for number in numbers:
        bits[number // 8] |= 1 << number % 8
    return int.from_bytes(bits, "little")


def _sizes(evidence: Evidence, pruned: Sequence[Pruned]) -> Chart:
    methods = _methods(pruned)
    keys = {method: method_key(method, evidence.methods) for method in methods}
    figures = []
    for model, kind in product(evidence.models, TITLES):
        those = [it for it in pruned if it.model == model and kind in it.units]
        if those:
            layout = {"xaxis": axis("layer", **_whole(_depth(those, kind))), "yaxis": _counting(those, kind)}
            many = evidence.has_many_lines
            lines = _averaged(those, kind, keys) if many else _single(those, kind, keys, evidence.ratios)
            figures.append(Figure(f"{model}: {TITLES[kind]} kept", model, lines, layout))
    about = "What each layer of the dense model keeps; nothing where the layer went."
    over_ratios = " The mean over ratios, within its range."
    about += over_ratios if evidence.has_many_lines else dashes_told(evidence.ratios, "ratio")
    return Chart("layers", "Widths and heads by layer", about, figures, list(keys.values()), NOTHING_PRUNED)


def _methods(pruned: Sequence[Pruned]) -> list[str]:
    return list(dict.fromkeys(it.method for it in pruned))


def _counting(pruned: Sequence[Pruned], kind: str) -> dict[str, Any]:
    """Settings for an axis that counts units."""
    most = max(bits.bit_count() for it in pruned for bits in it.units[kind].layers.values())
    return {"rangemode": "tozero", **_whole(most)}


def _whole(most: int) -> dict[str, Any]:
    """Settings for an axis of whole numbers."""
    return {"dtick": 1} if most < 10 else {}


def _depth(pruned: Sequence[Pruned], kind: str) -> int:
    return 1 + max(max(it.units[kind].layers) for it in pruned)


def _single(pruned: Sequence[Pruned], kind: str, keys: Mapping[str, Key], ratios: Sequence[float]) -> list[Trace]:
    layers = _depth(pruned, kind)
    traces = []
    for it in pruned:
        key = keys[it.method]
        look = {"color": key.color, "width": 2, "shape": "hvh", "dash": dash(it.ratio, ratios)}
        name = shown(f"{it.method} {it.ratio:g}")
        traces.append(line(key, [*range(layers)], it.units[kind].counts(layers), line=look, name=name))
    return traces


def _averaged(pruned: Sequence[Pruned], kind: str, keys: Mapping[str, Key]) -> list[Trace]:
    layers = _depth(pruned, kind)
    traces = []
    for method in _methods(pruned):
        counts = zip(*(it.units[kind].counts(layers) for it in pruned if it.method == method), strict=True)
        columns = [(min(of_layer), fmean(of_layer), max(of_layer)) for of_layer in counts]
        low, mean, high = ([column[place] for column in columns] for place in range(3))
        traces += [band(keys[method], [*range(layers)], low, high), line(keys[method], [*range(layers)], mean)]
    return traces


def _overlap(evidence: Evidence, pruned: Sequence[Pruned]) -> Chart:
    places = dict.fromkeys((it.model, it.ratio) for it in pruned)
    found = (
        _heat_map(model, ratio, kind, [it for it in pruned if (it.model, it.ratio) == (model, ratio)])
        for model, ratio in places
        for kind in TITLES
    )
    about = "Of all units that either of two methods keeps, the share that both keep."
    figures = [figure for figure in found if figure is not None]
    return Chart("overlap", "Overlap of what methods keep", about, figures, [], "No two methods to compare yet.")


def _heat_map(model: str, ratio: float, kind: str, pruned: Sequence[Pruned]) -> Figure | None:
    those = [it for it in pruned if kind in it.units]
    if len(those) < 2:
        return None
    names = [shown(it) for it in _names(those)]
    shares = [[ours.units[kind].common_share(theirs.units[kind]) for theirs in those] for ours in those]
    map_of = {"type": "heatmap", "x": names, "y": names, "z": shares, "zmin": 0, "zmax": 1, "colorscale": "Cividis"}
    text = {"texttemplate": "%{z:.2f}", "hovertemplate": "%{y} and %{x}: %{z:.3f}", "name": "", "showscale": False}
    layout = {"xaxis": {"type": "category"}, "yaxis": {"type": "category", "autorange": "reversed"}}
    title = f"{model}, {percent_of(ratio)} removed: {TITLES[kind]}"
    return Figure(title, model, [map_of | text], layout, height=160 + 28 * len(those))


def _names(pruned: Sequence[Pruned]) -> list[str]:
    """The methods behind checkpoints of one model and ratio. A method may have several, each for rows of its own
    recovery, if runs differed in their settings.
    """
    counts = Counter(it.method for it in pruned)
    return [it.method if counts[it.method] == 1 else row_name(it.method, it.recovery) for it in pruned]
