"""The charts of a report, in the format of plotly.js: plain JSON, so that nothing needs to be imported to make one.

To add one, write a function that returns a ``Chart`` and add it to ``charts``; something that rows measure goes into
``results/metrics.py`` and ``MEASURES``.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.pruned_config import KEPT, read_kept_numbers
from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.planning.plan import NONE, OWN, Cell, Plan
from hfprune_dist.results.metrics import METRICS, headline
from hfprune_dist.results.rows import Row
from hfprune_dist.results.table import other_texts
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import CUTTING

Trace = dict[str, Any]
# Of Okabe and Ito, which can be distinguished with all common kinds of colour blindness, without their yellow and
# black, which vanish on one of the two backgrounds.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#888888"
# Of plotly.js.
DASHES = ("solid", "dash", "dot", "dashdot", "longdash", "longdashdot")


@dataclass(frozen=True)
class Figure:
    """One panel of a chart; its layout's fonts, colours and margins are set by the page."""

    title: str
    data: Sequence[Trace]
    layout: dict[str, Any]


@dataclass(frozen=True)
class Chart:
    """A section of the page, with ``id`` as its anchor; ``about`` describes it in a sentence or two."""

    id: str
    title: str
    about: str
    figures: Sequence[Figure]


def charts(rows: Sequence[Row], plan: Plan, store: Store) -> list[Chart]:
    """All charts that there is data for, in the order of the page."""
    found = [*_quality(rows), _layers(rows, plan, store), _losses(rows, plan, store)]
    return [chart for chart in found if chart.figures]


def _line(rows: Sequence[Row], method: str | None, name: str, xs: Sequence[Any], ys: Sequence[Any], dash: str) -> Trace:
    """A line in its method's colour."""
    methods = list(dict.fromkeys(row["method"] for row in rows if row["method"]))
    color = PALETTE[methods.index(method) % len(PALETTE)] if method else GREY
    escaped = html.escape(name, quote=False)  # plotly.js interprets some HTML
    hover = "%{fullData.name}<br>%{x}, %{y}"
    trace: Trace = {"type": "scatter", "mode": "lines", "name": escaped, "hovertemplate": hover, "x": xs, "y": ys}
    return trace | {"line": {"color": color, "dash": dash, "width": 2}, "marker": {"size": 8, "color": color}}


def _dash(cell: Cell, rows: Sequence[Row]) -> str:
    """The dash pattern of a row's ratio; they repeat."""
    ratios = sorted({row["ratio"] for row in rows})
    return DASHES[ratios.index(cell.ratio or 0.0) % len(DASHES)]


def _finished(plan: Plan, store: Store, *kinds: str) -> Iterator[tuple[Cell, str, Path]]:
    """Yield a row, kind and artifact of each finished stage of these kinds."""
    first = {stage_id: cell for cell in reversed(plan.cells) for stage_id in cell.producers}
    for stage_id, cell in reversed(first.items()):
        handle, kind = store.handle(stage_id), plan.stages[stage_id].kind
        if kind in kinds and handle.manifest():
            yield cell, kind, handle.artifact


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


def _quality(rows: Sequence[Row]) -> list[Chart]:
    """Quality, distance from the dense model and scores of tasks, against size."""
    of_rows: dict[str, tuple[Measure, dict[str, Any]]] = {
        METRICS[key].header: (_of_row(key), axis) for key, axis in MEASURES.items()
    }
    of_rows |= {f"KL on {text}": (_on_text(text), MEASURES["kl"]) for text in other_texts(rows)}
    tasks = dict.fromkeys(task for row in rows for task in row["tasks"])
    of_tasks: dict[str, tuple[Measure, dict[str, Any]]] = {task: (_of_task(task), PERCENT) for task in tasks}
    told = "; ".join(f"{METRICS[key].header}: {METRICS[key].told}" for key in MEASURES)
    about = "Solid lines are with recovery, dotted ones without; grey: the dense model. "
    return [
        Chart("quality", "Quality against size", about + told, _panels(rows, of_rows)),
        Chart("tasks", "Tasks against size", about, _panels(rows, of_tasks)),
    ]


def _of_row(key: str) -> Measure:
    return lambda row: (METRICS[key].value(row), METRICS[key].error(row))


def _on_text(text: str) -> Measure:
    return lambda row: _of_row("kl")(row[OTHER_TEXTS].get(text, {}))


def _of_task(task: str) -> Measure:
    return lambda row: headline(row["tasks"].get(task, {}))


def _panels(rows: Sequence[Row], measures: Mapping[str, tuple[Measure, dict[str, Any]]]) -> list[Figure]:
    """A figure for each model and measure of which rows have a value, along their numbers of parameters."""
    figures = []
    models = dict.fromkeys(row["model"] for row in rows)
    for model, (title, (measure, axis)) in product(models, measures.items()):
        sized = [row for row in rows if row["model"] == model and row["parameters"]]
        known = sorted((row for row in sized if measure(row)[0] is not None), key=lambda row: int(row["parameters"]))
        lines: dict[tuple[str | None, str], list[Row]] = {}
        for row in known:
            lines.setdefault((row["method"], row["recovery"]), []).append(row)
        ends = [known[0]["parameters"], known[-1]["parameters"]] if known else []
        traces = []
        for (method, recovery), on_line in lines.items():
            name = (method or "dense") + ("" if recovery in (NONE, OWN) else f" + {recovery}")
            ys, errors = zip(*map(measure, on_line), strict=True)
            dash = "dot" if recovery == NONE else "solid"
            trace = _line(rows, method, name, [row["parameters"] for row in on_line], ys, dash)
            if method is None:  # the dense model's only point, as a line across
                trace |= {"x": ends, "y": [ys[0], ys[0]]}
            else:
                bars = {"type": "data", "array": errors, "thickness": 1.2, "width": 4}
                trace |= {"mode": "lines+markers", "error_y": bars}
            traces.append(trace)
        layout = {"xaxis": {"title": {"text": "parameters"}, "tickformat": ".4~s"}, "yaxis": axis}
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


def _layers(rows: Sequence[Row], plan: Plan, store: Store) -> Chart:
    traces: dict[tuple[str, str], list[Trace]] = {}
    for cell, _, artifact in _finished(plan, store, *CUTTING):
        if not (artifact / KEPT).is_file():  # removed to make room
            continue
        layers, units = read_kept_numbers(artifact)
        for kind, kept in units.items():
            counts = {layer: len(numbers) for layer, numbers in zip(layers, kept, strict=True)}
            ys = [counts.get(layer, 0) for layer in range(1 + max(layers))]
            name = f"{cell.method} {cell.ratio:g}"
            trace = _line(rows, cell.method, name, [*range(len(ys))], ys, _dash(cell, rows))
            trace["line"]["shape"] = "hvh"
            traces.setdefault((cell.model, kind), []).append(trace)
    layout = {"xaxis": {"title": {"text": "layer"}}, "yaxis": {"rangemode": "tozero"}}
    figures = [Figure(f"{model}: {UNITS[kind]} kept", data, layout) for (model, kind), data in traces.items()]
    return Chart("layers", "Widths and heads by layer", "What each layer of the dense model keeps.", figures)


# What training recorded.

TRAINING = {"distill": "distillation", "recover": "recovery", "loraprune": "recovery that prunes"}
MOST_POINTS = 200


def _losses(rows: Sequence[Row], plan: Plan, store: Store) -> Chart:
    traces: dict[tuple[str, str], list[Trace]] = {}
    for cell, kind, artifact in _finished(plan, store, *TRAINING):
        if losses := training_losses(artifact / "loss.jsonl"):
            name = f"{cell.method or 'dense'} {cell.ratio or 0:g}"
            trace = _line(rows, cell.method, name, list(losses), list(losses.values()), _dash(cell, rows))
            traces.setdefault((cell.model, kind), []).append(trace)
    layout = {"xaxis": {"title": {"text": "step"}}, "yaxis": {}}
    figures = [Figure(f"{model}: loss of {TRAINING[kind]}", data, layout) for (model, kind), data in traces.items()]
    return Chart("losses", "Training", "Training loss by optimizer step.", figures)


def training_losses(file: Path) -> Mapping[int, float]:
    """Step -> loss, thinned to about ``MOST_POINTS``; none if the file was removed to make room."""
    try:
        records = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    except FileNotFoundError:
        return {}
    losses = [(line["step"], line["loss"]) for line in records if math.isfinite(line.get("loss") or math.nan)]
    stride = -(-len(losses) // MOST_POINTS) or 1
    return dict([*losses[::stride], *losses[-1:]])
