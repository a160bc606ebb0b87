"""The charts of a report, in the format of plotly.js: plain JSON, so that nothing needs to be imported to make one.

To add a chart, write a function from ``Evidence`` to ``Chart`` and add it to ``charts``; something that rows measure
goes into ``results/metrics.py`` and ``MEASURES``.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.pruned_config import KEPT, read_kept_numbers
from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.planning.plan import NONE, OWN, Cell
from hfprune_dist.report.evidence import Evidence
from hfprune_dist.results.headline import headline
from hfprune_dist.results.metrics import METRICS
from hfprune_dist.results.rows import Row
from hfprune_dist.results.table import other_texts
from hfprune_dist.store.stage import CUTTING, Stage

Trace = dict[str, Any]
# Of Okabe and Ito, which can be distinguished with all common kinds of colour blindness, without their yellow and
# black, which vanish on one of the two backgrounds.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#888888"
# Of plotly.js.
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class Figure:
    """One panel of a chart.

    Attributes:
        layout: layout settings of plotly.js; fonts, colours and margins are set by the page.
        height: in pixels.
    """

    title: str
    data: Sequence[Trace]
    layout: dict[str, Any]
    height: int = 360


@dataclass(frozen=True)
class Chart:
    """A section of the page.

    Attributes:
        id: its anchor in the page.
        about: description of the chart, in a sentence or two.
    """

    id: str
    title: str
    about: str
    figures: Sequence[Figure]


def charts(evidence: Evidence) -> list[Chart]:
    """All charts that there is data for, in the order of the page."""
    found = [*_quality(evidence), _layers(evidence), _losses(evidence), timeline(evidence)]
    return [chart for chart in found if chart.figures]


def _shown(text: str) -> str:
    """Escape a name for plotly.js, which interprets some HTML."""
    return html.escape(text, quote=False)


def _line(evidence: Evidence, method: str | None, name: str, xs: Sequence[Any], ys: Sequence[Any], dash: str) -> Trace:
    """A line in its method's colour."""
    number = evidence.methods.index(method) if method else 0
    color = PALETTE[number % len(PALETTE)] if method else GREY
    mark = {"size": 8, "color": color}
    look = {"color": color, "dash": dash, "width": 2}
    hover = "%{fullData.name}<br>%{x}, %{y}"
    trace: Trace = {"type": "scatter", "mode": "lines", "name": _shown(name), "hovertemplate": hover}
    return trace | {"x": xs, "y": ys, "line": look, "marker": mark}


def _dash(cell: Cell, evidence: Evidence) -> str:
    """The dash pattern of a row's ratio; they repeat."""
    ratios = sorted({row["ratio"] for row in evidence.rows})
    return DASHES[ratios.index(cell.ratio or 0.0) % len(DASHES)]


# What rows measure.

PERCENT: dict[str, Any] = {"tickformat": ".3~p"}
MEASURES: dict[str, dict[str, Any]] = {
    "average": PERCENT,
    "kl": {"rangemode": "tozero"},
    "top1_agreement": PERCENT,
    "perplexity": {"type": "log"},
}
# A value and its standard error, from a row.
Measure = Callable[[Row], tuple[float | None, float | None]]


def _quality(evidence: Evidence) -> list[Chart]:
    """Quality, distance from the dense model and scores of tasks, against size."""
    of_rows: dict[str, tuple[Measure, dict[str, Any]]] = {
        METRICS[key].header: (_of_row(key), axis) for key, axis in MEASURES.items()
    }
    of_rows |= {f"KL on {text}": (_on_text(text), MEASURES["kl"]) for text in other_texts(evidence.rows)}
    tasks = dict.fromkeys(task for row in evidence.rows for task in row["tasks"])
    of_tasks: dict[str, tuple[Measure, dict[str, Any]]] = {task: (_of_task(task), PERCENT) for task in tasks}
    told = "; ".join(f"{METRICS[key].header}: {METRICS[key].told}" for key in MEASURES)
    about = "Solid lines are with recovery, dotted ones without; grey: the dense model. "
    return [
        Chart("quality", "Quality against size", about + told, _panels(evidence, of_rows)),
        Chart("tasks", "Tasks against size", about, _panels(evidence, of_tasks)),
    ]


def _of_row(key: str) -> Measure:
    return lambda row: (METRICS[key].value(row), METRICS[key].error(row))


def _on_text(text: str) -> Measure:
    return lambda row: _of_row("kl")(row[OTHER_TEXTS].get(text, {}))


def _of_task(task: str) -> Measure:
    return lambda row: headline(row["tasks"].get(task, {}))


def _panels(evidence: Evidence, measures: Mapping[str, tuple[Measure, dict[str, Any]]]) -> list[Figure]:
    """A figure for each model and measure of which rows have a value, along their numbers of parameters."""
    figures = []
    for model, (title, (measure, height)) in product(evidence.models, measures.items()):
        rows = [row for row in evidence.rows if row["model"] == model and row["parameters"]]
        known = sorted((it for it in rows if measure(it)[0] is not None), key=lambda row: int(row["parameters"]))
        lines: dict[tuple[str | None, str], list[Row]] = {}
        for row in known:
            lines.setdefault((row["method"], row["recovery"]), []).append(row)
        ends = [known[0]["parameters"], known[-1]["parameters"]] if known else []
        traces = []
        for (method, recovery), on_line in lines.items():
            name = (method or "dense") + ("" if recovery in (NONE, OWN) else f" + {recovery}")
            ys, errors = zip(*map(measure, on_line), strict=True)
            dash = "dot" if recovery == NONE else "solid"
            trace = _line(evidence, method, name, [row["parameters"] for row in on_line], ys, dash)
            if method is None:  # the dense model's only point, as a line across
                trace |= {"x": ends, "y": [ys[0], ys[0]]}
            else:
                bars = {"type": "data", "array": errors, "thickness": 1.2, "width": 4}
                trace |= {"mode": "lines+markers", "error_y": bars}
            traces.append(trace)
        layout = {"xaxis": {"title": {"text": "parameters"}, "tickformat": ".4~s"}, "yaxis": height}
        figures += [Figure(f"{model}: {title}", traces, layout)] if traces else []
    return figures


# What checkpoints keep.

UNITS = {
    "neurons": "neurons",
    "expert_neurons": "neurons of experts",
    "shared_neurons": "neurons of shared experts",
    "experts": "experts",
    "kv_groups": "key-value heads",
}


def _layers(evidence: Evidence) -> Chart:
    traces: dict[tuple[str, str], list[Trace]] = {}
    for cell, _, artifact in evidence.finished(*CUTTING):
        if not (artifact / KEPT).is_file():  # removed to make room
            continue
        layers, units = read_kept_numbers(artifact)
        for kind, rows in units.items():
            counts = {layer: len(row) for layer, row in zip(layers, rows, strict=True)}
            ys = [counts.get(layer, 0) for layer in range(1 + max(layers))]
            name = f"{cell.method} {cell.ratio:g}"
            trace = _line(evidence, cell.method, name, [*range(len(ys))], ys, _dash(cell, evidence))
            trace["line"]["shape"] = "hvh"
            traces.setdefault((cell.model, kind), []).append(trace)
    layout = {"xaxis": {"title": {"text": "layer"}}, "yaxis": {"rangemode": "tozero"}}
    figures = [Figure(f"{model}: {UNITS[kind]} kept", it, layout) for (model, kind), it in traces.items()]
    return Chart("layers", "Widths and heads by layer", "What each layer of the dense model keeps.", figures)


# What training recorded.

TRAINING = {"distill": "distillation", "recover": "recovery", "loraprune": "recovery that prunes"}
MOST_POINTS = 200


def _losses(evidence: Evidence) -> Chart:
    traces: dict[tuple[str, str], list[Trace]] = {}
    for cell, kind, artifact in evidence.finished(*TRAINING):
        if losses := training_losses(artifact / "loss.jsonl"):
            name = f"{cell.method or 'dense'} {cell.ratio or 0:g}"
            trace = _line(evidence, cell.method, name, list(losses), list(losses.values()), _dash(cell, evidence))
            traces.setdefault((cell.model, kind), []).append(trace)
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {}}
    figures = [Figure(f"{model}: loss of {TRAINING[kind]}", it, layout) for (model, kind), it in traces.items()]
    return Chart("losses", "Training", "Training loss by optimizer step.", figures)


def training_losses(file: Path) -> Mapping[int, float]:
    """Step -> loss, thinned to about ``MOST_POINTS``; none if the file was removed to make room."""
    try:
        records = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return {}
    losses = [(it["step"], it["loss"]) for it in records if math.isfinite(it.get("loss") or math.nan)]
    stride = -(-len(losses) // MOST_POINTS) or 1
    return dict([*losses[::stride], *losses[-1:]])


# When stages ran.


def timeline(evidence: Evidence) -> Chart:
    """The timeline, with a bar for each attempt that has begun; an open one ends, for now, at the report's time."""
    stages = evidence.plan.stages.values()
    begun = [(stage, it, it.started) for stage in stages for it in evidence.attempts[stage.id] if it.started]
    begun.sort(key=lambda it: it[2])
    traces = []
    for kind in dict.fromkeys(stage.kind for stage, *_ in begun):
        bars = [(stage, it, start) for stage, it, start in begun if stage.kind == kind]
        lengths = [max((evidence.written if it.ended is None else it.ended) - start, 1.0) for _, it, start in bars]
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": kind,
                "y": [_line_of(stage) for stage, *_ in bars],
                "base": [f"{datetime.fromtimestamp(start, UTC):%Y-%m-%d %H:%M:%S}" for *_, start in bars],
                "x": [1000 * seconds for seconds in lengths],
                "hovertext": [
                    _shown(f"attempt {it.number}: {seconds:.0f} s, {it.cause or it.state} {it.where}")
                    for (_, it, _), seconds in zip(bars, lengths, strict=True)
                ],
                "hovertemplate": "%{y}<br>%{hovertext}<extra></extra>",
            }
        )
    order = [*dict.fromkeys(_line_of(stage) for stage, *_ in begun)]
    vertical = {"type": "category", "categoryarray": order, "autorange": "reversed"}
    layout = {"barmode": "overlay", "xaxis": {"type": "date"}, "yaxis": vertical}
    about = "A bar is an attempt at a stage. Times are UTC."
    figures = [Figure("", traces, layout, height=150 + 22 * len(order))] if traces else []
    return Chart("timeline", "Timeline", about, figures)


def _line_of(stage: Stage) -> str:
    return _shown(f"{stage.kind} {stage.label} {stage.id[-4:]}")
