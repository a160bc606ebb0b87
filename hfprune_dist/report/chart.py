"""A chart as plotly.js draws it: plain JSON, so that nothing is imported to make one.

Colours are Okabe and Ito's, which people with any of the common kinds of colour blindness tell apart, without their
yellow and black, which vanish on one of the two backgrounds. Points differ in their shape too.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Trace = dict[str, Any]

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#888888"
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "x", "star")
DASHES = ("solid", "dash", "dot", "dashdot", "longdash")
NAMES = {"solid": "solid", "dash": "dashed", "dot": "dotted", "dashdot": "dashes and dots", "longdash": "long dashes"}


@dataclass(frozen=True)
class Style:
    """How lines and points of one thing look.

    Attributes:
        symbol: of plotly.js.
    """

    color: str
    symbol: str


def style(number: int) -> Style:
    """The look of the n-th of several things; colours come again after six, with other marks."""
    return Style(PALETTE[number % len(PALETTE)], SYMBOLS[number % len(SYMBOLS)])


def method_color(method: str | None, methods: Sequence[str]) -> str:
    """The colour that a method has in all charts; grey for the dense model."""
    return GREY if method is None else style(methods.index(method)).color


def dash(value: float, values: Sequence[float]) -> str:
    """The dashes of one of several ratios or shares."""
    return DASHES[values.index(value) % len(DASHES)]


def dashes_told(values: Sequence[float], meaning: str) -> str:
    """A sentence that explains ``dash``; empty where there is nothing to tell apart."""
    told = [f"{NAMES[dash(value, values)]} {value:.0%}" for value in values]
    return f" Lines by {meaning}: {', '.join(told)}." if len(told) > 1 else ""


@dataclass(frozen=True)
class Key:
    """One entry of a chart's legend, for all traces whose ``legendgroup`` is its name."""

    name: str
    color: str
    dash: str = "solid"


@dataclass(frozen=True)
class Figure:
    """One panel.

    Attributes:
        model: whose it is; empty where it is everybody's.
        layout: of plotly.js; fonts, colours and margins are the page's.
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
        id: names it in the page's addresses.
        about: what is shown, in a sentence or two.
        absent: what is said where there is no figure.
    """

    id: str
    title: str
    about: str
    figures: Sequence[Figure]
    keys: Sequence[Key]
    absent: str


def shown(text: str) -> str:
    """A name as plotly.js shows it, which reads some HTML."""
    return html.escape(text, quote=False)


def axis(title: str, **settings: Any) -> dict[str, Any]:
    """An axis of a layout."""
    return {"title": {"text": shown(title)}, **settings}


def line(key: Key, xs: Sequence[Any], ys: Sequence[Any], **settings: Any) -> Trace:
    """A line that belongs to a legend's entry."""
    look = {"color": key.color, "dash": key.dash, "width": 2}
    named = {"name": shown(key.name), "legendgroup": key.name, "hovertemplate": "%{fullData.name}<br>%{x}, %{y}"}
    return {"type": "scatter", "mode": "lines", **named, "x": xs, "y": ys, "line": look, **settings}


def band(key: Key, xs: Sequence[Any], low: Sequence[float], high: Sequence[float]) -> Trace:
    """The range around a line: one outline, filled."""
    outline = {"x": [*xs, *reversed(xs)], "y": [*high, *reversed(low)], "fill": "toself", "fillcolor": key.color}
    look = {"line": {"width": 0}, "opacity": 0.2, "hoverinfo": "skip"}
    return {"type": "scatter", "mode": "lines", "legendgroup": key.name, **outline, **look}
