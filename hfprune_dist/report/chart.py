"""Charts in the format of plotly.js: plain JSON, so that nothing needs to be imported to make one.

Colours are those of Okabe and Ito, which can be distinguished with all common kinds of colour blindness, without their
yellow and black, which vanish on one of the two backgrounds. Points differ in shape, too.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hfprune_dist.planning.plan import NONE, OWN

Trace = dict[str, Any]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#888888"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
# Dash patterns of plotly.js -> their names.
DASHES = {
    "solid": "solid",
    "dash": "dashed",
    "dot": "dotted",
    "dashdot": "dashes and dots",
    "longdash": "long dashes",
    "longdashdot": "long dashes and dots",
    "2px,12px": "sparse dots",
}
# The most marks on a line that has them to be told from others of its colour.
MOST_MARKS = 8


@dataclass(frozen=True)
class Style:
    """The look of a series' lines and points.

    Attributes:
        symbol: a marker symbol of plotly.js.
    """

    color: str
    symbol: str


def style(number: int) -> Style:
    """The look of the n-th of several series; colours repeat after six, with other symbols."""
    return Style(PALETTE[number % len(PALETTE)], SYMBOLS[number % len(SYMBOLS)])


def percent_of(share: float) -> str:
    """A ratio or share as it was asked for, in percent."""
    return f"{100 * share:.4g}%"


def dash(value: float, values: Sequence[float]) -> str:
    """The dash pattern for one of at most ``len(DASHES)`` ratios or shares."""
    return [*DASHES][values.index(value)]


def dashes_told(values: Sequence[float], meaning: str) -> str:
    """A sentence that explains the dash patterns; empty if there is nothing to tell apart."""
    told = [f"{DASHES[dash(value, values)]} {percent_of(value)}" for value in values]
    return f" Lines by {meaning}: {', '.join(told)}." if len(told) > 1 else ""


@dataclass(frozen=True)
class Key:
    """An entry of a chart's legend, for all traces whose ``legendgroup`` is its name.

    Attributes:
        symbol: a marker symbol of plotly.js; None if its lines have no marks.
    """

    name: str
    color: str
    dash: str = "solid"
    symbol: str | None = None


def series_key(name: str, number: int) -> Key:
    """The entry for the lines of the n-th of several series. They have marks if an earlier series has their colour."""
    look = style(number)
    return Key(name, look.color, symbol=look.symbol if number >= len(PALETTE) else None)


def method_key(method: str | None, methods: Sequence[str]) -> Key:
    """The entry for a method's lines, in its colour in all charts; grey for the dense model."""
    if method is None:
        return Key("dense", GREY)
    return series_key(method, methods.index(method))


def row_name(method: str | None, recovery: str) -> str:
    """The name of a method's rows with this recovery."""
    return (method or "dense") + ("" if recovery in (NONE, OWN) else f" + {recovery}")


@dataclass(frozen=True)
class Figure:
    """One panel of a chart.

    Attributes:
        model: the model that it shows; empty if it shows all models.
        layout: layout settings of plotly.js; fonts, colours and margins are set by the page.
        height: in pixels.
    """

    title: str
    model: str
    data: Sequence[Trace]
    layout: dict[str, Any]
    height: int = 320


@dataclass(frozen=True)
class Chart:
    """A section of the page: panels that share a legend.

    Attributes:
        id: its anchor in the page.
        about: description of the chart, in a sentence or two.
        absent: text shown if there is no figure.
    """

    id: str
    title: str
    about: str
    figures: Sequence[Figure]
    keys: Sequence[Key]
    absent: str


def shown(text: str) -> str:
    """Escape a name for plotly.js, which interprets some HTML."""
    return html.escape(text, quote=False)


def axis(title: str, **settings: Any) -> dict[str, Any]:
    """An axis of a layout, with a title."""
    return {"title": {"text": shown(title)}, **settings}


def line(key: Key, xs: Sequence[Any], ys: Sequence[Any], **settings: Any) -> Trace:
    """A line that belongs to an entry of the legend."""
    look = {"color": key.color, "dash": key.dash, "width": 2}
    named = {"name": shown(key.name), "legendgroup": key.name, "hovertemplate": "%{fullData.name}<br>%{x}, %{y}"}
    marks = {} if key.symbol is None else {"marker": {"symbol": key.symbol, "size": 7, "maxdisplayed": MOST_MARKS}}
    mode = "lines+markers" if marks else "lines"
    return {"type": "scatter", "mode": mode, **marks, **named, "x": xs, "y": ys, "line": look, **settings}


def band(key: Key, xs: Sequence[Any], low: Sequence[float], high: Sequence[float]) -> Trace:
    """The range around a line, as a filled outline."""
    outline = {"x": [*xs, *reversed(xs)], "y": [*high, *reversed(low)], "fill": "toself", "fillcolor": key.color}
    look = {"line": {"width": 0}, "opacity": 0.2, "hoverinfo": "skip"}
    return {"type": "scatter", "mode": "lines", "legendgroup": key.name, **outline, **look}
