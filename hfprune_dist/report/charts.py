"""The charts of a report: quality, distance from the dense model, tasks, layers, overlap, losses and the timeline.

To add a chart of something that rows measure, add it to ``results/metrics.py``, and a panel to ``quality_charts``; for
anything else, write a function from ``Evidence`` to ``Chart``, and add it to ``charts``.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.pruned_config import read_kept_numbers
from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.planning.plan import NONE, Cell
from hfprune_dist.report.chart import (
    GREY,
    PALETTE,
    Chart,
    Figure,
    Key,
    Trace,
    axis,
    dash,
    dashes_told,
    line,
    method_key,
    percent_of,
    row_name,
    shown,
    symbol,
)
from hfprune_dist.report.evidence import Evidence
from hfprune_dist.results.headline import headline, headline_error
from hfprune_dist.results.metrics import METRICS
from hfprune_dist.results.rows import Row
from hfprune_dist.store.attempt import Attempt
from hfprune_dist.store.stage import CUTTING, STAGE_VERSIONS, Stage, kind_of


def charts(evidence: Evidence) -> list[Chart]:
    """All charts, in the order of the page."""
    pruned = [*_pruned(evidence)]
    layers = [_sizes_by_layer(evidence, pruned), _overlap(pruned)]
    return [*quality_charts(evidence), *layers, _losses(evidence), timeline(evidence)]


# What rows measure.

Value = Callable[[Row], float | None]
# Of values that are all alike, as those of dense models, plotly.js would show the axis to 200 %; marks need some room.
OF_SHARES = "autorangeoptions"
PERCENT: dict[str, Any] = {"tickformat": ".3~p", OF_SHARES: {"clipmin": -0.05, "clipmax": 1.05}}
LOG: dict[str, Any] = {"type": "log", "exponentformat": "none"}
AXES = {"average": PERCENT, "top1_agreement": PERCENT, "perplexity": LOG, "kl": {"rangemode": "tozero"}}


@dataclass(frozen=True)
class Measure:
    """A measurement in rows, with the axis settings of plotly.js, and its standard error, None if there is none."""

    title: str
    value: Value
    axis: Mapping[str, Any]
    error: Value = lambda _: None


# What rows are placed along.
SIZE = Measure("parameters", METRICS["parameters"].value, {"tickformat": ".4~s"})
SPEED = Measure("decoding speed, dense = 1", METRICS["decode_speed"].value, {"tickformat": ".3~g"})
RATIO = Measure("parameters removed", METRICS["ratio_reached"].value, {"tickformat": ".3~p", "rangemode": "tozero"})


def _measure(key: str, text: str | None = None) -> Measure:
    """A metric of rows, or of their comparison on a further text."""
    metric, title = METRICS[key], METRICS[key].header + (" (log)" if AXES[key] is LOG else "")
    if text is None:
        return Measure(title, metric.value, AXES[key], metric.error)

    def of(read: Value) -> Value:
        return lambda row: read(row[OTHER_TEXTS].get(text, {}))

    return Measure(f"{title} on {text}", of(metric.value), AXES[key], of(metric.error))


def _task(name: str) -> list[Measure]:
    """The measures for a task's headline and for its perplexity; each task has only one of them."""

    def of(read: Callable[[Mapping[str, Any]], float | None]) -> Value:
        return lambda row: read(row["tasks"].get(name, {}))

    perplexity = of(lambda scores: scores.get("word_perplexity"))
    error = of(lambda scores: scores.get("word_perplexity_stderr"))
    scores = Measure(name, of(headline), PERCENT, of(headline_error))
    return [scores, Measure(f"{name}, word perplexity (log)", perplexity, LOG, error)]


def quality_charts(evidence: Evidence) -> list[Chart]:
    """Charts of quality against size, and against speed if measured, of distance from the dense model, and of tasks."""
    texts = dict.fromkeys(text for row in evidence.rows for text in row[OTHER_TEXTS])
    tasks = dict.fromkeys(task for row in evidence.rows for task in row["tasks"])
    quality = [_measure("average"), _measure("perplexity")]
    distance = [_measure("kl"), _measure("top1_agreement"), *(_measure("kl", text) for text in texts)]
    keys = _keys(evidence)

    def chart(id: str, title: str, about: str, measures: Iterable[Measure], scale: Measure) -> Chart:
        panels = [_panel(evidence, keys, *it, scale) for it in product(evidence.models, measures)]
        figures = [it for it in panels if it is not None]
        return Chart(id, title, about, figures, list(keys.values()), "No cell has this result yet.")

    lines = "Grey lines are the dense model, and the dense model with the same recovery."
    told = "; ".join(f"{METRICS[key].header}: {METRICS[key].told}" for key in ("kl", "top1_agreement"))
    found = [chart("size", "Quality against size", lines, quality, SIZE)]
    if any(cell.efficiency for cell in evidence.plan.cells):
        about = f"{lines} Speed: {METRICS['decode_speed'].told}."
        found.append(chart("speed", "Quality against speed", about, quality, SPEED))
    found.append(chart("distance", "Distance from the dense model", f"On held-out text. {told}.", distance, RATIO))
    of_tasks = [measure for task in tasks for measure in _task(task)]
    return [*found, chart("tasks", "Tasks", f"With standard errors. {lines}", of_tasks, RATIO)]


def _keys(evidence: Evidence) -> dict[tuple[str | None, str], Key]:
    """(method, recovery) -> legend entry: one colour per method, dotted without recovery, where marks are open."""
    methods = evidence.methods

    def place(key: tuple[str | None, str]) -> tuple[int, bool, str]:
        method, recovery = key
        return -1 if method is None else methods.index(method), recovery != NONE, recovery

    found = sorted({(row["method"], row["recovery"]) for row in evidence.rows}, key=place)
    return {
        (method, recovery): replace(
            method_key(method, methods),
            name=row_name(method, recovery),
            dash="dot" if recovery == NONE else "solid",
            symbol=None if method is None else symbol(number),
        )
        for number, (method, recovery) in enumerate(found)
    }


def _panel(
    evidence: Evidence, keys: Mapping[tuple[str | None, str], Key], model: str, measure: Measure, scale: Measure
) -> Figure | None:
    """Figure of a measure of one model along a scale; None if no row has it."""
    rows = [row for row in evidence.rows if row["model"] == model]
    known = [row for row in rows if measure.value(row) is not None and scale.value(row) is not None]
    if not known:
        return None
    along = [value for row in known if (value := scale.value(row)) is not None]
    traces = []
    for (method, recovery), key in keys.items():
        of_key = [row for row in known if (row["method"], row["recovery"]) == (method, recovery)]
        if of_key:
            trace = _points(key, of_key, measure, scale)
            traces.append(trace if method else _across(trace, min(along), max(along)))
    height = dict(measure.axis)
    if any(value > 1 for row in known if (value := measure.value(row)) is not None):
        height.pop(OF_SHARES, None)  # which would leave out scores that a task reports in percent
    layout = {"xaxis": axis(scale.title, **scale.axis), "yaxis": height}
    return Figure(f"{model}: {measure.title}", model, traces, layout)


def _points(key: Key, rows: Sequence[Row], measure: Measure, scale: Measure) -> Trace:
    ordered = sorted(rows, key=lambda row: scale.value(row) or 0.0)
    trace = line(key, [scale.value(row) for row in ordered], [measure.value(row) for row in ordered])
    mark = (key.symbol or "circle") + ("-open" if key.dash == "dot" else "")
    trace |= {"mode": "lines+markers", "marker": {"symbol": mark, "size": 9, "color": key.color}}
    errors = [measure.error(row) for row in ordered]
    return trace | ({"error_y": _bars(errors)} if any(it is not None for it in errors) else {})


def _across(trace: Trace, least: float, most: float) -> Trace:
    """The dense model's single point as a line across all rows; left as a point if there are no other rows."""
    if least == most:
        return trace
    level = {"x": [least, most], "y": trace["y"] * 2, "mode": "lines"}
    return trace | level | ({"error_y": _bars([None, *trace["error_y"]["array"]])} if "error_y" in trace else {})


def _bars(errors: Sequence[float | None]) -> dict[str, Any]:
    return {"type": "data", "array": list(errors), "thickness": 1.2, "width": 4}


# What checkpoints keep.

UNITS = {
    "neurons": "neurons",
    "expert_neurons": "neurons of experts",
    "shared_neurons": "neurons of shared experts",
    "experts": "experts",
    "kv_groups": "key-value heads",
}


@dataclass(frozen=True)
class Pruned:
    """A pruned checkpoint.

    Attributes:
        units: kind of units -> layer -> indices of those that it keeps, as the bits of an integer.
    """

    cell: Cell
    units: Mapping[str, Mapping[int, int]]


def _pruned(evidence: Evidence) -> Iterator[Pruned]:
    for stage in evidence.finished(*CUTTING):
        # A cell also depends on earlier cuts; only the last one counts.
        cells = [it for it in evidence.cells_of(stage.id) if _last_cut(it) == stage.id]
        units = _kept(evidence.store.handle(stage.id).artifact)
        if cells and units:
            yield Pruned(cells[0], units)


def _last_cut(cell: Cell) -> str:
    return [stage_id for stage_id in cell.producers if kind_of(stage_id) in CUTTING][-1]


@cache  # artifacts never change
def _read_kept(artifact: Path) -> Mapping[str, Mapping[int, int]]:
    layers, units = read_kept_numbers(artifact)
    return {
        kind: {layer: sum(1 << number for number in row) for layer, row in zip(layers, rows, strict=True)}
        for kind, rows in units.items()
    }


def _kept(artifact: Path) -> Mapping[str, Mapping[int, int]]:
    """Kind -> layer -> kept units; none if the artifact's files were removed to make room."""
    try:
        return _read_kept(artifact)
    except FileNotFoundError:
        return {}


def common_share(ours: Mapping[int, int], theirs: Mapping[int, int]) -> float:
    """Share of the units kept by either of two checkpoints that both keep."""
    pairs = [(ours.get(layer, 0), theirs.get(layer, 0)) for layer in ours.keys() | theirs.keys()]
    return sum((a & b).bit_count() for a, b in pairs) / sum((a | b).bit_count() for a, b in pairs)


def _sizes_by_layer(evidence: Evidence, pruned: Sequence[Pruned]) -> Chart:
    methods = dict.fromkeys(it.cell.method for it in pruned)
    keys = {method: method_key(method, evidence.methods) for method in methods}
    figures = []
    for model, kind in product(evidence.models, UNITS):
        those = [it for it in pruned if it.cell.model == model and kind in it.units]
        if those:
            depth = 1 + max(max(it.units[kind]) for it in those)
            most = max(bits.bit_count() for it in those for bits in it.units[kind].values())
            layout = {"xaxis": axis("layer", **_whole(depth)), "yaxis": {"rangemode": "tozero", **_whole(most)}}
            lines = [_staircase(it, kind, depth, keys[it.cell.method], evidence.ratios) for it in those]
            figures.append(Figure(f"{model}: {UNITS[kind]} kept", model, lines, layout))
    about = f"What each layer of the dense model keeps; nothing where the layer went.{dashes_told(evidence.ratios)}"
    absent = "No model has been pruned yet."
    return Chart("layers", "Widths and heads by layer", about, figures, list(keys.values()), absent)


def _staircase(pruned: Pruned, kind: str, depth: int, key: Key, ratios: Sequence[float]) -> Trace:
    cell, units = pruned.cell, pruned.units[kind]
    pattern = dash(cell.ratio or 0.0, ratios)
    look = {"color": key.color, "width": 2, "shape": "hvh", "dash": pattern}
    counts = [units.get(layer, 0).bit_count() for layer in range(depth)]
    return line(key, [*range(depth)], counts, line=look, name=shown(f"{cell.method} {cell.ratio:g}"))


def _whole(most: int) -> dict[str, Any]:
    """Settings for an axis of whole numbers."""
    return {"dtick": 1} if most < 10 else {}


def _overlap(pruned: Sequence[Pruned]) -> Chart:
    figures = []
    for model, ratio in dict.fromkeys((it.cell.model, it.cell.ratio) for it in pruned):
        for kind in UNITS:
            here = [it for it in pruned if (it.cell.model, it.cell.ratio) == (model, ratio) and kind in it.units]
            if len(here) > 1:
                title = f"{model}, {percent_of(ratio or 0.0)} removed: {UNITS[kind]}"
                figures.append(_heat_map(title, model, kind, here))
    about = "Of all units that either of two methods keeps, the share that both keep."
    return Chart("overlap", "Overlap of what methods keep", about, figures, [], "No two methods to compare yet.")


def _heat_map(title: str, model: str, kind: str, pruned: Sequence[Pruned]) -> Figure:
    # A method may have several, each for rows of its own recovery, if runs differed in their settings.
    times = Counter(it.cell.method for it in pruned)
    cells = [it.cell for it in pruned]
    names = [shown(row_name(it.method, it.recovery if times[it.method] > 1 else NONE)) for it in cells]
    shares = [[common_share(ours.units[kind], theirs.units[kind]) for theirs in pruned] for ours in pruned]
    values = {"type": "heatmap", "x": names, "y": names, "z": shares, "zmin": 0, "zmax": 1, "colorscale": "Cividis"}
    text = {"texttemplate": "%{z:.2f}", "hovertemplate": "%{y} and %{x}: %{z:.3f}", "name": "", "showscale": False}
    layout = {"xaxis": {"type": "category"}, "yaxis": {"type": "category", "autorange": "reversed"}}
    return Figure(title, model, [values | text], layout, height=160 + 28 * len(pruned))


# What training recorded.

TRAINING = {"distill": "distillation", "recover": "recovery", "loraprune": "recovery that prunes"}
MOST_POINTS = 200


def _losses(evidence: Evidence) -> Chart:
    figures: dict[tuple[str, str], Figure] = {}
    keys: dict[str | None, Key] = {}
    for stage in evidence.finished(*TRAINING):
        cell = evidence.cells_of(stage.id)[0]
        losses = training_losses(evidence.store.handle(stage.id).artifact / "loss.jsonl")
        if losses:
            key = keys.setdefault(cell.method, method_key(cell.method, evidence.methods))
            key = key if cell.ratio is None else replace(key, dash=dash(cell.ratio, evidence.ratios))
            title = f"{cell.model}: loss of {TRAINING[stage.kind]}"
            empty = Figure(title, cell.model, [], {"xaxis": axis("step")})
            figure = figures.setdefault((cell.model, stage.kind), empty)
            curve = line(key, list(losses), list(losses.values()), name=shown(stage.label))
            figures[cell.model, stage.kind] = replace(figure, data=[*figure.data, curve])
    about = f"Training loss by optimizer step.{dashes_told(evidence.ratios)}"
    absent = "No checkpoint has been trained yet."
    return Chart("losses", "Training", about, list(figures.values()), list(keys.values()), absent)


def training_losses(file: Path) -> Mapping[int, float]:
    """Step -> loss, thinned to about ``MOST_POINTS``; none if the file was removed to make room."""
    try:
        return _read_losses(file)
    except FileNotFoundError:
        return {}


@cache  # artifacts never change
def _read_losses(file: Path) -> Mapping[int, float]:
    records = [json.loads(text) for text in file.read_text(encoding="utf-8").splitlines()]
    told = [(it["step"], it["loss"]) for it in records if it.get("loss") is not None]
    losses = [(step, loss) for step, loss in told if math.isfinite(loss)]  # which is all that JSON has words for
    stride = -(-len(losses) // MOST_POINTS) or 1
    return dict([*losses[::stride], *losses[-1:]])


# When stages ran.

# With more stages than this, there is one line per kind of stage instead of one per stage.
MOST_LINES = 60
# Idle time is cut out of the chart if it exceeds both this share of the busy time and this number of seconds.
LONG_IDLE_SHARE, LONG_IDLE_S = 0.1, 300.0
# The yellow of the same palette is too pale for lines, but not for bars.
BAR_COLORS = (*PALETTE, GREY, "#F0E442")
# Patterns of plotly.js, by state of the attempt.
PATTERNS = {"done": "", "failed": "x", "open": "."}


@dataclass(frozen=True)
class Period:
    """An attempt that has begun, with start and end in unix time; an open one ends, for now, at the report's time."""

    stage: Stage
    attempt: Attempt
    start: float
    end: float


def timeline(evidence: Evidence) -> Chart:
    """The timeline, with a bar for each attempt."""
    periods = [
        Period(stage, it, it.started, max(it.started, evidence.written if it.ended is None else it.ended))
        for stage in evidence.plan.stages.values()
        for it in evidence.attempts[stage.id]
        if it.started is not None
    ]
    periods.sort(key=lambda it: it.start)
    title, absent = "Timeline", "No stage has begun yet."
    if not periods:
        return Chart("timeline", title, "", [], [], absent)
    kinds = [kind for kind in STAGE_VERSIONS if any(it.stage.kind == kind for it in periods)]
    keys = {kind: Key(kind, BAR_COLORS[[*STAGE_VERSIONS].index(kind) % len(BAR_COLORS)]) for kind in kinds}
    by_kind = len({it.stage.id for it in periods}) > MOST_LINES
    lines = list(dict.fromkeys(_line_of(it.stage, by_kind) for it in periods))
    idle = [*long_idle_times(periods)]
    ticks = [periods[0].start, *(end for _, end in idle), max(it.end for it in periods)]
    layout = {
        "barmode": "overlay",
        "xaxis": {
            "type": "date",
            "rangebreaks": [{"bounds": [_iso(begin), _iso(end)]} for begin, end in idle],
            "tickvals": [*map(_iso, ticks)],
            "tickformat": "%Y-%m-%d<br>%H:%M",
        },
        "yaxis": {"type": "category", "categoryarray": [*map(shown, lines)], "autorange": "reversed"},
    }
    traces = [_attempts([it for it in periods if it.stage.kind == kind], key, by_kind) for kind, key in keys.items()]
    figure = Figure("", "", traces, layout, height=90 + 22 * len(lines))
    about = "A bar is an attempt at a stage; crossed ones failed, dotted ones have no end yet. Times are UTC."
    about += f" Long idle times are left out ({len(idle)})." if idle else ""
    return Chart("timeline", title, about, [figure], list(keys.values()), absent)


def long_idle_times(periods: Sequence[Period]) -> Iterator[tuple[float, float]]:
    """Yield (begin, end) of the idle times that the chart leaves out.

    Args:
        periods: sorted by start; at least one.
    """
    gaps, busy, until = [], 0.0, periods[0].start
    for it in periods:
        if it.start > until:
            gaps.append((until, it.start))
        busy += max(0.0, it.end - max(it.start, until))
        until = max(until, it.end)
    yield from (gap for gap in gaps if gap[1] - gap[0] > max(LONG_IDLE_S, LONG_IDLE_SHARE * busy))


def _line_of(stage: Stage, by_kind: bool) -> str:
    return stage.kind if by_kind else f"{stage.kind} {stage.label} {stage.fingerprint[:4]}"


def _attempts(periods: Sequence[Period], key: Key, by_kind: bool) -> Trace:
    patterns = [PATTERNS[it.attempt.state] for it in periods]
    return {
        "type": "bar",
        "orientation": "h",
        "name": shown(key.name),
        "legendgroup": key.name,
        "y": [shown(_line_of(it.stage, by_kind)) for it in periods],
        "base": [_iso(it.start) for it in periods],
        # In milliseconds; at least a second, since a shorter bar would be invisible.
        "x": [1000 * max(it.end - it.start, 1.0) for it in periods],
        "hovertext": [shown(_told(it)) for it in periods],
        "hovertemplate": "%{hovertext}<extra></extra>",
        "marker": {"color": key.color, "pattern": {"shape": patterns}},
    }


def _told(period: Period) -> str:
    attempt = period.attempt
    said = f"{period.stage.kind} {period.stage.label}, attempt {attempt.number}: {_iso(period.start)[:16]}, "
    said += f"{period.end - period.start:.0f} s, {attempt.cause or attempt.state}"
    return said + (f", {attempt.where}" if attempt.where else "")


def _iso(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S.%f}"
