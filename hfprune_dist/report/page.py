"""The page: one file with its styles, its script, plotly.js and all data; it makes no network requests."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from importlib.resources import files

from hfprune_dist.report.chart import Chart, Figure
from hfprune_dist.report.curves import curve_charts
from hfprune_dist.report.evidence import Evidence
from hfprune_dist.report.facts import failures, provenance, summary, time_of
from hfprune_dist.report.layers import layer_charts
from hfprune_dist.report.legend import legend_entry
from hfprune_dist.report.quality import quality_charts
from hfprune_dist.report.rows_table import rows_table
from hfprune_dist.report.timeline import timeline_chart

# Makes the browser refuse everything that would need the network.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
# With more models than this, the page shows only the first one initially.
MOST_MODELS_AT_ONCE = 4


def page(evidence: Evidence) -> str:
    """The HTML of a report."""
    name = escape(evidence.out.resolve().name)
    charts = [*quality_charts(evidence), *layer_charts(evidence), *curve_charts(evidence)]
    timeline = timeline_chart(evidence)
    sections = [
        _section("rows-section", "Rows", _switch() + f"<div class=wide>{rows_table(evidence)}</div>"),
        *map(_chart, charts),
        _section(timeline.id, timeline.title, _body(timeline) + failures(evidence)),
        _section("provenance-section", "Where results come from", provenance(evidence)),
    ]
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<link rel="icon" href="data:,"><title>{name}: report</title>',
            f"<style>{_own('page.css')}</style></head><body>",
            f"<header><h1>{name}</h1><p>Written {time_of(evidence.written)}.</p>{_models(evidence.models)}",
            f"<nav>{_nav([*charts, timeline])}</nav></header>",
            f"<main>{summary(evidence)}",
            "<noscript><p class=note>Charts need JavaScript; the table has their numbers.</p></noscript>",
            *sections,
            f'</main><script type="application/json" id=figures>{_json([*charts, timeline])}</script>',
            f"<script>{_plotly()}</script><script>{_own('page.js')}</script></body></html>",
        ]
    )


def _nav(charts: Sequence[Chart]) -> str:
    places = [(chart.id, chart.title) for chart in charts if chart.figures]
    places = [("rows-section", "Rows"), *places, ("provenance-section", "Where results come from")]
    return " ".join(f'<a href="#{id}">{escape(title)}</a>' for id, title in places)


def _own(name: str) -> str:
    return (files("hfprune_dist.report") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Source of plotly.js; imported only when a page is written, so that nothing else waits for the import."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _json(charts: Sequence[Chart]) -> str:
    """JSON of all figures, in the order of the page's panels, escaped so that no text in it can end the script."""
    drawn = [{"data": figure.data, "layout": figure.layout} for chart in charts for figure in chart.figures]
    text = json.dumps(drawn, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _section(id: str, title: str, body: str) -> str:
    return f'<section id="{id}"><h2>{escape(title)}</h2>{body}</section>'


def _chart(chart: Chart) -> str:
    return _section(chart.id, chart.title, _body(chart))


def _body(chart: Chart) -> str:
    if not chart.figures:
        return f"<p class=absent>{escape(chart.absent)}</p>"
    keys = "".join(map(legend_entry, chart.keys))
    panels = "".join(map(_panel, chart.figures))
    return f"<p>{escape(chart.about)}</p><div class=keys>{keys}</div><div class=panels>{panels}</div>"


def _panel(figure: Figure) -> str:
    title = f"<figcaption>{escape(figure.title)}</figcaption>" if figure.title else ""
    one = "" if figure.title else " class=whole"
    plot = f'<div class=plot style="height:{figure.height}px"></div>'
    return f'<figure data-model="{escape(figure.model)}"{one}>{title}{plot}</figure>'


def _models(models: Sequence[str]) -> str:
    """HTML of the menu that selects the model to show; empty if there is only one."""
    if len(models) < 2:
        return ""
    first = models[0] if len(models) > MOST_MODELS_AT_ONCE else ""
    options = "".join(
        f'<option value="{escape(it)}"{" selected" * (it == first)}>{escape(it)}</option>' for it in models
    )
    return f'<label>model <select id=model><option value="">all</option>{options}</select></label>'


def _switch() -> str:
    return (
        "<p>A click on a header sorts. KL is in nats per token from the dense model, agreement the share of tokens "
        "with its most likely next token; ± is one standard error. "
        "<label><input type=checkbox id=all-columns> all columns</label></p>"
    )
