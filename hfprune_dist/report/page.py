"""The page: one file with its styles, its script, plotly.js and all data; it makes no network requests."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from hfprune_dist.report.charts import Chart, Figure, charts
from hfprune_dist.report.evidence import Evidence
from hfprune_dist.results.formats import counted
from hfprune_dist.results.metrics import METRICS, OF_TEXT
from hfprune_dist.results.rows import Row
from hfprune_dist.results.table import causes, flat_row
from hfprune_dist.store.heartbeat import in_one_line

# Makes the browser refuse everything that would need the network.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
LONGEST_MESSAGE = 500


def page(evidence: Evidence) -> str:
    """The HTML of a report."""
    name, drawn = escape(evidence.out.resolve().name), charts(evidence)
    told = "; ".join(f"{METRICS[key].header}: {METRICS[key].told}" for key in ("kl", "top1_agreement"))
    switch = "<label><input type=checkbox id=all-columns> all columns</label>"
    rows = f"<p>A click on a header sorts. {escape(told)}; ±: one standard error. {switch}</p>{_rows_table(evidence)}"
    sections = [
        ("rows-section", "Rows", rows),
        *((chart.id, chart.title, _body(chart)) for chart in drawn),
        ("failures-section", "Failures", _failures(evidence)),
        ("provenance-section", "Where results come from", _provenance(evidence)),
    ]
    places = " ".join(f'<a href="#{id}">{escape(title)}</a>' for id, title, _ in sections)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<link rel="icon" href="data:,"><title>{name}: report</title>',
            f"<style>{_own('page.css')}</style></head><body>",
            f"<header><h1>{name}</h1><p>Written {_time(evidence.written)}.</p>",
            f"<nav>{places}</nav></header><main>{_summary(evidence)}",
            "<noscript><p class=note>Charts need JavaScript; the table has their numbers.</p></noscript>",
            *(f'<section id="{id}"><h2>{escape(title)}</h2>{body}</section>' for id, title, body in sections),
            f'</main><script type="application/json" id=figures>{_json(drawn)}</script>',
            f"<script>{_plotly()}</script><script>{_own('page.js')}</script></body></html>",
        ]
    )


def _own(name: str) -> str:
    return (files("hfprune_dist.report") / name).read_text(encoding="utf-8")


def _plotly() -> str:
    """Source of plotly.js; imported only when a page is written, so that nothing else waits for the import."""
    from plotly.offline import get_plotlyjs

    return str(get_plotlyjs())


def _json(drawn: Sequence[Chart]) -> str:
    """JSON of all figures, in the order of the page's panels, escaped so that no text in it can end the script."""
    figures = [{"data": figure.data, "layout": figure.layout} for chart in drawn for figure in chart.figures]
    text = json.dumps(figures, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _body(chart: Chart) -> str:
    return f"<p>{escape(chart.about)}</p><div class=panels>{''.join(map(_panel, chart.figures))}</div>"


def _panel(figure: Figure) -> str:
    title = f"<figcaption>{escape(figure.title)}</figcaption>" if figure.title else ""
    whole = "" if figure.title else " class=whole"
    plot = f'<div class=plot style="height:{figure.height}px"></div>'
    return f"<figure{whole}>{title}{plot}</figure>"


def _rows_table(evidence: Evidence) -> str:
    """HTML of the table of rows: everything in results.csv, with a few columns shown at first."""
    flat = [flat_row(row) for row in evidence.rows]
    metrics = {it.key: it for it in METRICS.values() if (it.in_few or it.key in OF_TEXT) and it.is_known(flat)}
    few = ["label", *metrics, "checkpoint", "status"]
    more = list(dict.fromkeys(column for row in flat for column in row if column not in few))

    def header(column: str) -> str:
        name = escape(metrics[column].header if column in metrics else column)
        return f'<th scope="col"><button type=button title="{escape(column)}">{name}</button></th>'

    def cell(column: str, row: Row) -> str:
        """HTML of a cell formatted for people; ``data-v`` is the value from results.csv."""
        value = row.get(column)
        text = escape(metrics[column].shown(row) if column in metrics else str(value or "-"))
        if column == "label":
            text = f"<span>{text}</span>"
        elif column == "status" and value == "missing":
            text = f"missing: {escape(row['cause'])}"
        elif column == "checkpoint" and value and (evidence.out / value).is_dir():
            text = f'<a href="{_link(evidence.out / value, evidence)}">{escape(Path(value).name)}</a>'
        return f'<td data-v="{escape("" if value is None else str(value))}">{text}</td>'

    lines = [
        f"<tr class={row['status']}>"
        + "".join(cell(column, row) for column in few)
        + "".join(f"<td>{'' if (value := row.get(it)) is None else escape(str(value))}</td>" for it in more)
        + "</tr>"
        for row in flat
    ]
    # Cells are hidden by position: marking each one would take megabytes.
    beyond = f":is(th,td):nth-child(n+{len(few) + 1}){{display:none}}"
    body = "\n".join(lines)
    return (
        f"<style>#rows:not(.all) {beyond}</style><div class=wide><table id=rows><thead>"
        f"<tr>{''.join(map(header, [*few, *more]))}</tr></thead><tbody>\n{body}\n</tbody></table></div>"
    )


def _link(target: Path, evidence: Evidence) -> str:
    """A relative URL from the report to a file, which still works if both are moved together."""
    return escape(quote(os.path.relpath(target, evidence.out)))


def _time(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _summary(evidence: Evidence) -> str:
    """HTML of the sweep's progress: finished rows and stages, what runs, what is missing, what can't be compared."""
    done = sum(row["status"] == "done" for row in evidence.rows)
    made = [manifest for manifest in evidence.manifests.values() if manifest]
    hours = sum(manifest.get("wall_time_s") or 0.0 for manifest in made) / 3600
    lacking = evidence.plan.lacking(lambda stage_id: evidence.manifests[stage_id] is not None)
    stages = f"{len(made)} of {counted(len(made) + len(lacking), 'stage')} made, in {hours:.1f} hours"
    running = [
        f"begun, without an end: {stage.kind} {stage.label} {attempt.message}"
        for stage in evidence.plan.stages.values()
        for attempt in evidence.attempts[stage.id]
        if attempt.state == "open"
    ]
    lines = "".join(f"<li>{escape(it)}</li>" for it in [*running, *causes(evidence.rows)])
    told = f"<p><b>{done} of {counted(len(evidence.rows), 'row')}</b> with a result; {stages}.</p>"
    return told + (f"<div class=note><ul>{lines}</ul></div>" if lines else "")


def _table(id: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """HTML of a table; ``lines`` are cells in HTML."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f"<div class=wide><table id={id}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"


def _failures(evidence: Evidence) -> str:
    """HTML table of all attempts that ended without an artifact."""
    lines = []
    for stage in evidence.plan.stages.values():
        for it in evidence.attempts[stage.id]:
            if it.state == "failed":
                logs = [f'<a href="{_link(log, evidence)}">{escape(log.name)}</a>' for log in it.logs]
                ended = "-" if it.ended is None else _time(it.ended)
                message = in_one_line(it.message)[:LONGEST_MESSAGE]
                texts = (f"{stage.kind} {stage.label}", str(it.number), ended, it.cause, message)
                lines.append([*map(escape, texts), " ".join([escape(it.where), *logs])])
    head = ("stage", "attempt", "ended", "cause", "message", "log")
    return _table("failures", head, lines) if lines else "<p>No attempt has failed.</p>"


def _provenance(evidence: Evidence) -> str:
    """HTML of what rows were evaluated with, and of the configuration of the last run."""
    origins = [{**it, **it.get("packages", {})} for row in evidence.rows if (it := row["provenance"])]
    names = dict.fromkeys(name for origin in origins for name in origin if name not in ("date", "packages"))
    distinct = {name: dict.fromkeys(str(origin.get(name) or "-") for origin in origins) for name in names}
    lines = [[escape(name), "<br>".join(map(escape, values))] for name, values in distinct.items()]
    config = f"<details><summary>configuration of the last run</summary><pre>{escape(evidence.config)}</pre></details>"
    return _table("provenance", ("", "of the evaluations"), lines) + (config if evidence.config else "")
