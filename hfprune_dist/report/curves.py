"""The chart of what stages recorded on the way: training losses."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median

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
    """The chart of training losses."""
    return [_losses(evidence)]


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
