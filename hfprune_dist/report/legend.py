"""Entries of legends: a piece of the line and the mark on it, as plotly.js draws them, and the name."""

from __future__ import annotations

from html import escape

from hfprune_dist.report.chart import Key

_PLUS = "M-1.7-5H1.7V-1.7H5V1.7H1.7V5H-1.7V1.7H-5V-1.7H-1.7z"
# Marker symbols of plotly.js, around the origin.
_SHAPES = {
    "circle": "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0-8 0z",
    "square": "M-4-4H4V4H-4z",
    "diamond": "M0-5L5 0L0 5L-5 0z",
    "triangle-up": "M0-5L5 4H-5z",
    "cross": _PLUS,
    "x": _PLUS,
    "star": "M0-5L1.2-1.6L4.8-1.5L1.9 .6L2.9 4L0 2L-2.9 4L-1.9 .6L-4.8-1.5L-1.2-1.6z",
}


def legend_entry(key: Key) -> str:
    """HTML of an entry, a button that hides and shows its traces."""
    stroke = f'stroke="{key.color}" stroke-width="3" stroke-dasharray="{"" if key.dash == "solid" else "2 4"}"'
    swatch = f'<svg width="28" height="12" aria-hidden=true><path d="M0 6H28" {stroke}/>{_mark(key)}</svg>'
    name = escape(key.name)
    return f'<button type=button class=key aria-pressed=true data-key="{name}">{swatch} {name}</button>'


def _mark(key: Key) -> str:
    if key.symbol is None:
        return ""
    fill = key.color if key.dash == "solid" else "var(--back)"
    turned = " rotate(45)" if key.symbol == "x" else ""
    place = f'transform="translate(14 6){turned}"'
    return f'<path d="{_SHAPES[key.symbol]}" {place} fill="{fill}" stroke="{key.color}"/>'
