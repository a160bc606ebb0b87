"""Charts of what stages recorded on the way: training losses, and whether more windows would change what is kept."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

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
    series_key,
    shown,
)
from hfprune_dist.report.evidence import Evidence

TITLES = {"distill": "distillation", "recover": "recovery", "loraprune": "recovery that prunes"}
MOST_POINTS = 200

Keys = Mapping[str | None, Key]


@dataclass(frozen=True)
class Curve:
    """The losses of one training stage, by step."""

    model: str
    kind: str
    method: str | None
    ratio: float | None
    label: str
    losses: Mapping[int, float]


def curve_charts(evidence: Evidence) -> list[Chart]:
    """The charts of training losses and of split halves."""
    return [_losses(evidence), _split_halves(evidence)]


def _losses(evidence: Evidence) -> Chart:
    curves = [*_curves(evidence)]
    methods = list(dict.fromkeys(it.method for it in curves))
    keys = {method: method_key(method, evidence.methods) for method in methods}
    figures = []
    for model, kind in product(evidence.models, TITLES):
        those = [it for it in curves if (it.model, it.kind) == (model, kind)]
        if those:
            lines = _medians(those, keys) if evidence.has_many_lines else _single(those, keys, evidence.ratios)
            figures.append(Figure(f"{model}: loss of {TITLES[kind]}", model, lines, {"xaxis": axis("step")}))
    about = "Training loss by optimizer step."
    over_checkpoints = " The median over checkpoints, within its range."
    about += over_checkpoints if evidence.has_many_lines else dashes_told(evidence.ratios, "ratio")
    return Chart("losses", "Training", about, figures, list(keys.values()), "No checkpoint has been trained yet.")


def _curves(evidence: Evidence) -> Iterator[Curve]:
    for kind in TITLES:
        for stage, _ in evidence.finished(kind):
            cell = evidence.cells_of(stage.id)[0]
            if losses := _training_losses(evidence.store.handle(stage.id).artifact / "loss.jsonl"):
                yield Curve(cell.model, kind, cell.method, cell.ratio, stage.label, losses)


def _training_losses(file: Path) -> Mapping[int, float]:
    """Step -> loss; none if the file can't be read, without which the rest of the page can be drawn."""
    try:
        return _read(file)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return {}


@cache
def _read(file: Path) -> Mapping[int, float]:
    """Step -> loss, thinned to about ``MOST_POINTS``. Artifacts never change, so each file is read only once."""
    records = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    told = [(int(it["step"]), float(it["loss"])) for it in records if it.get("loss") is not None]
    losses = [(step, loss) for step, loss in told if math.isfinite(loss)]  # which is all that JSON has words for
    stride = -(-len(losses) // MOST_POINTS) or 1
    return dict([*losses[::stride], *losses[-1:]])


def _single(curves: Sequence[Curve], keys: Keys, ratios: Sequence[float]) -> list[Trace]:
    traces = []
    for it in curves:
        key = keys[it.method]
        key = key if it.ratio is None else replace(key, dash=dash(it.ratio, ratios))
        traces.append(line(key, list(it.losses), list(it.losses.values()), name=shown(it.label)))
    return traces


def _medians(curves: Sequence[Curve], keys: Keys) -> list[Trace]:
    traces = []
    for method, key in keys.items():
        those = [it.losses for it in curves if it.method == method]
        steps = sorted({step for losses in those for step in losses})
        at = [[losses[step] for losses in those if step in losses] for step in steps]
        if steps:
            traces += [band(key, steps, [*map(min, at)], [*map(max, at)]), line(key, steps, [*map(median, at)])]
    return traces


def _split_halves(evidence: Evidence) -> Chart:
    scored = [(stage, metrics.get("split_half_overlap", [])) for stage, metrics in evidence.finished("importance")]
    criteria = list(dict.fromkeys(point["criterion"] for _, points in scored for point in points))
    keys = {criterion: series_key(criterion, number) for number, criterion in enumerate(criteria)}
    shares = sorted({point["share_kept"] for _, points in scored for point in points}, reverse=True)
    figures = []
    for stage, points in scored:
        if points:
            model = evidence.cells_of(stage.id)[0].model
            layout = {"xaxis": axis("calibration windows"), "yaxis": {"tickformat": ".3~p"}}
            title = f"{stage.label}, pass {stage.fingerprint[:4]}: in both halves"
            figures.append(Figure(title, model, _halves(points, keys, shares), layout))
    about = (
        "Of the units that one half of the calibration windows would keep, the share that the other half keeps too. "
        "Where lines still rise, more windows would change what stays." + dashes_told(shares, "share of units kept")
    )
    absent = "No calibration pass was long enough to be split."
    return Chart("halves", "Calibration windows", about, figures, list(keys.values()), absent)


def _halves(points: Sequence[Mapping[str, Any]], keys: Mapping[str, Key], shares: Sequence[float]) -> list[Trace]:
    traces = []
    for (criterion, key), share in product(keys.items(), shares):
        those = [it for it in points if (it["criterion"], it["share_kept"]) == (criterion, share)]
        those.sort(key=lambda it: it["windows"])
        if those:
            dashed = replace(key, dash=dash(share, shares))
            name = shown(f"{criterion}, {percent_of(share)} kept")
            xs, ys = [it["windows"] for it in those], [it["overlap"] for it in those]
            traces.append(line(dashed, xs, ys, name=name, mode="lines+markers"))
    return traces
