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
_PLUS = "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7z"
# Marker symbols of plotly.js, and their outlines around the origin.
SYMBOLS = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-4-4H4V4H-4z",
    "diamond": "M0-5L5 0L0 5L-5 0z",
    "triangle-up": "M0-5L5 4H-5z",
    "cross": _PLUS,
    "x": _PLUS,
    "star": "M0-5L1.2-1.6L4.8-1.5L1.9 .6L2.9 4L0 2L-2.9 4L-1.9 .6L-4.8-1.5L-1.2-1.6z",
}
# The most marks on a line that has them to be told from others of its colour.
MOST_MARKS = 8


@dataclass(frozen=True)
class Key:
    """An entry of a chart's legend, for all traces whose ``legendgroup`` is its name.

    Attributes:
        symbol: one of ``SYMBOLS``; None if its lines have no marks.
    """

    name: str
    color: str
    dash: str = "solid"
    symbol: str | None = None

    @classmethod
    def of(cls, name: str, number: int) -> Key:
        """The entry for the n-th of several series; from the seventh on, when colours repeat, lines have marks."""
        return cls(name, PALETTE[number % len(PALETTE)], symbol=symbol(number) if number >= len(PALETTE) else None)

    def entry(self) -> str:
        """HTML of the entry, a button that hides and shows its traces: a piece of the line, the mark, the name."""
        stroke = f'stroke="{self.color}" stroke-width="3" stroke-dasharray="{"" if self.dash == "solid" else "2 4"}"'
        swatch = f'<svg width="28" height="12" aria-hidden=true><path d="M0 6H28" {stroke}/>{self._mark()}</svg>'
        name = html.escape(self.name)
        return f'<button type=button class=key aria-pressed=true data-key="{name}">{swatch} {name}</button>'

    def _mark(self) -> str:
        if self.symbol is None:
            return ""
        fill = self.color if self.dash == "solid" else "var(--back)"
        place = f'transform="translate(14 6){" rotate(45)" if self.symbol == "x" else ""}"'
        return f'<path d="{SYMBOLS[self.symbol]}" {place} fill="{fill}" stroke="{self.color}"/>'


def symbol(number: int) -> str:
    """The mark of the n-th of several series."""
    return [*SYMBOLS][number % len(SYMBOLS)]


def method_key(method: str | None, methods: Sequence[str]) -> Key:
    """The entry for a method's lines, in its colour in all charts; grey for the dense model."""
    return Key("dense", GREY) if method is None else Key.of(method, methods.index(method))


def row_name(method: str | None, recovery: str) -> str:
    """The name of a method's rows with this recovery."""
    return (method or "dense") + ("" if recovery in (NONE, OWN) else f" + {recovery}")


def dash(ratio: float, ratios: Sequence[float]) -> str:
    """The dash pattern of one of several ratios; they repeat after seven."""
    return [*DASHES][ratios.index(ratio) % len(DASHES)]


def dashes_told(ratios: Sequence[float]) -> str:
    """A sentence that explains the dash patterns; empty if there is nothing to tell apart."""
    told = [f"{DASHES[dash(ratio, ratios)]} {percent_of(ratio)}" for ratio in ratios]
    return f" Lines by ratio: {', '.join(told)}." if len(told) > 1 else ""


def percent_of(share: float) -> str:
    """A ratio as it was asked for, in percent."""
    return f"{100 * share:.4g}%"


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
