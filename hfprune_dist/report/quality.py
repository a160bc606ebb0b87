"""Charts of the measurements in rows: quality against size and speed, distance from the dense model, tasks.

To add a chart, define its y-axis (``Measure``) and its x-axis (``Scale``), and pass both to ``_figure``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.planning.plan import NONE
from hfprune_dist.report.chart import Chart, Figure, Key, Trace, axis, line, method_key, row_name, style
from hfprune_dist.report.evidence import Evidence
from hfprune_dist.results.headline import headline, headline_error
from hfprune_dist.results.rows import Row

Value = Callable[[Row], float | None]
Keys = Mapping[tuple[str | None, str], Key]


@dataclass(frozen=True)
class Measure:
    """A measurement in rows, shown on the y-axis.

    Attributes:
        error: returns its standard error; None if there is none.
        axis: axis settings of plotly.js.
    """

    title: str
    value: Value
    error: Value
    axis: Mapping[str, Any]


@dataclass(frozen=True)
class Scale:
    """The x-axis along which rows are placed."""

    title: str
    value: Value
    axis: Mapping[str, Any]


# Of values that are all alike, as those of dense models, plotly.js would show the axis to 200 %; marks need some room.
OF_SHARES = "autorangeoptions"
PERCENT = {"tickformat": ".3~p", OF_SHARES: {"clipmin": -0.05, "clipmax": 1.05}}
LOG = {"type": "log", "exponentformat": "none"}
SIZE = Scale("parameters", lambda row: row["parameters"], {"tickformat": ".4~s"})
SPEED = Scale("decoding speed, dense = 1", lambda row: row["decode_speed"], {"tickformat": ".3~g"})
RATIO = Scale("parameters removed", lambda row: row["ratio_reached"], {"tickformat": ".3~p", "rangemode": "tozero"})


def _of_rows(title: str, name: str, **settings: Any) -> Measure:
    return Measure(title, lambda row: row[name], lambda row: row.get(f"{name}_stderr"), settings)


AVERAGE = _of_rows("average of the tasks", "average", **PERCENT)
PERPLEXITY = _of_rows("perplexity (log)", "perplexity", **LOG)
KL = _of_rows("KL from dense, nats per token", "kl", rangemode="tozero")
QUALITY = (AVERAGE, PERPLEXITY)
TIMED = "Speed is of decoding, as a multiple of the dense model's in turn, under the most demanding workload."
AGREEMENT = _of_rows("same next token as dense", "top1_agreement", **PERCENT)


def _kl_on(text: str) -> Measure:
    def of(name: str) -> Value:
        return lambda row: row[OTHER_TEXTS].get(text, {}).get(name)

    return Measure(f"KL on {text}, nats per token", of("kl"), of("kl_stderr"), {"rangemode": "tozero"})


def _task(name: str) -> list[Measure]:
    """The measures for a task's headline and for its perplexity; each task has only one of them."""

    def of(read: Callable[[Mapping[str, Any]], float | None]) -> Value:
        return lambda row: read(row["tasks"].get(name, {}))

    perplexity = of(lambda metrics: metrics.get("word_perplexity"))
    error = of(lambda metrics: metrics.get("word_perplexity_stderr"))
    scores = Measure(name, of(headline), of(headline_error), PERCENT)
    return [scores, Measure(f"{name}, word perplexity (log)", perplexity, error, LOG)]


def quality_charts(evidence: Evidence) -> list[Chart]:
    """Charts of quality against size, and against speed if measured, of distance from the dense model, and of tasks."""
    texts = dict.fromkeys(text for row in evidence.rows for text in row[OTHER_TEXTS])
    tasks = dict.fromkeys(task for row in evidence.rows for task in row["tasks"])
    keys = keys_of(evidence)

    def chart(id: str, title: str, about: str, figures: Iterable[Figure | None]) -> Chart:
        found = [figure for figure in figures if figure is not None]
        return Chart(id, title, about, found, list(keys.values()), "No cell has this result yet.")

    def panels(measures: Sequence[Measure], scale: Scale) -> Iterable[Figure | None]:
        return (_figure(evidence, model, measure, scale) for model in evidence.models for measure in measures)

    baselines = "Grey lines are the dense model, and the dense model with the same recovery."
    timed = [f"{baselines} {TIMED}"] if any(cell.efficiency for cell in evidence.plan.cells) else []
    return [
        chart("size", "Quality against size", baselines, panels(QUALITY, SIZE)),
        *(chart("speed", "Quality against speed", told, panels(QUALITY, SPEED)) for told in timed),
        chart(
            "distance",
            "Distance from the dense model",
            "On held-out text: mean KL divergence, and how often the most likely next token is the same.",
            panels([KL, AGREEMENT, *map(_kl_on, texts)], RATIO),
        ),
        chart(
            "tasks",
            "Tasks",
            f"With standard errors. {baselines}",
            panels([it for task in tasks for it in _task(task)], RATIO),
        ),
    ]


def keys_of(evidence: Evidence) -> Keys:
    """(method, recovery) -> legend entry: one colour per method, dotted without recovery, where marks are open."""
    methods = evidence.methods
    found = sorted({(row["method"], row["recovery"]) for row in evidence.rows}, key=lambda it: _place(it, methods))
    return {
        (method, recovery): replace(
            method_key(method, methods),
            name=row_name(method, recovery),
            dash="dot" if recovery == NONE else "solid",
            symbol=None if method is None else style(number).symbol,
        )
        for number, (method, recovery) in enumerate(found)
    }


def _place(key: tuple[str | None, str], methods: Sequence[str]) -> tuple[int, bool, str]:
    method, recovery = key
    return -1 if method is None else methods.index(method), recovery != NONE, recovery


def _figure(evidence: Evidence, model: str, measure: Measure, scale: Scale) -> Figure | None:
    """Figure of a measure of one model along a scale; None if no row has it."""
    rows = [row for row in evidence.rows if row["model"] == model]
    known = [row for row in rows if measure.value(row) is not None and scale.value(row) is not None]
    if not known:
        return None
    traces: list[Trace] = []
    for (method, recovery), key in keys_of(evidence).items():
        of_key = [row for row in known if (row["method"], row["recovery"]) == (method, recovery)]
        if of_key:
            trace = _points(key, of_key, measure, scale)
            traces.append((trace if method else _across(trace, known, scale)) | _marks(key))
    return Figure(f"{model}: {measure.title}", model, traces, _layout(known, measure, scale))


def _layout(rows: Sequence[Row], measure: Measure, scale: Scale) -> dict[str, Any]:
    along = dict(measure.axis)
    if any(value > 1 for row in rows if (value := measure.value(row)) is not None):
        along.pop(OF_SHARES, None)  # which would leave out scores that a task reports in percent
    return {"xaxis": axis(scale.title, **scale.axis), "yaxis": along}


def _across(trace: Trace, rows: Sequence[Row], scale: Scale) -> Trace:
    """The dense model's single point as a line across all rows; left as a point if there are no other rows."""
    along = [value for row in rows if (value := scale.value(row)) is not None]
    if min(along) == max(along):
        return trace
    level = {"x": [min(along), max(along)], "y": trace["y"] * 2, "mode": "lines"}
    return trace | level | ({"error_y": _bars([None, *trace["error_y"]["array"]])} if "error_y" in trace else {})


def _marks(key: Key) -> dict[str, Any]:
    symbol = (key.symbol or "circle") + ("-open" if key.dash == "dot" else "")
    return {"marker": {"symbol": symbol, "size": 9, "color": key.color}}


def _points(key: Key, rows: Sequence[Row], measure: Measure, scale: Scale) -> Trace:
    ordered = sorted(rows, key=lambda row: scale.value(row) or 0.0)
    trace = line(key, [scale.value(row) for row in ordered], [measure.value(row) for row in ordered])
    return trace | {"mode": "lines+markers"} | _errors([measure.error(row) for row in ordered])


def _errors(errors: Sequence[float | None]) -> Trace:
    return {"error_y": _bars(errors)} if any(error is not None for error in errors) else {}


def _bars(errors: Sequence[float | None]) -> dict[str, Any]:
    return {"type": "data", "array": list(errors), "thickness": 1.2, "width": 4}
