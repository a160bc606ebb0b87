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

from hfprune_dist.planning.plan import Plan
from hfprune_dist.report.charts import Chart, charts
from hfprune_dist.results.formats import counted
from hfprune_dist.results.metrics import METRICS, OF_TEXT
from hfprune_dist.results.rows import Row
from hfprune_dist.results.table import causes, flat_row
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import PastAttempt, past_attempts
from hfprune_dist.store.heartbeat import in_one_line
from hfprune_dist.store.stage import Stage

# Makes the browser refuse everything that would need the network.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
LONGEST_MESSAGE = 500
# Stage and attempt, those of a stage first to last.
Attempts = Sequence[tuple[Stage, PastAttempt]]


def page(out: Path, plan: Plan, rows: Sequence[Row], written: float) -> str:
    """The HTML of a report.

    Args:
        out: the sweep's folder, which also holds the report.
        rows: one per cell of the plan.
        written: unix time of the report.
    """
    store, file = Store(out / "store"), out / "config.yaml"
    config = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    attempts = [
        (stage, attempt) for stage in plan.stages.values() for attempt in past_attempts(store, stage.id, out / "logs")
    ]
    name, drawn = escape(out.resolve().name), charts(rows, plan, store)
    told = "; ".join(f"{METRICS[key].header}: {METRICS[key].told}" for key in ("kl", "top1_agreement"))
    switch = "<label><input type=checkbox id=all-columns> all columns</label>"
    how = f"<p>A click on a header sorts. {escape(told)}; ±: one standard error. {switch}</p>"
    sections = [
        ("rows-section", "Rows", how + _rows_table(rows, out)),
        *((chart.id, chart.title, _body(chart)) for chart in drawn),
        ("failures-section", "Failures", _failures(attempts, out)),
        ("provenance-section", "Where results come from", _provenance(rows, config)),
    ]
    places = " ".join(f'<a href="#{id}">{escape(title)}</a>' for id, title, _ in sections)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<link rel="icon" href="data:,"><title>{name}: report</title>',
            f"<style>{_own('page.css')}</style></head><body>",
            f"<header><h1>{name}</h1><p>Written {_time(written)}.</p>",
            f"<nav>{places}</nav></header><main>{_summary(rows, plan, store, attempts)}",
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
    panels = (
        f"<figure><figcaption>{escape(figure.title)}</figcaption><div class=plot></div></figure>"
        for figure in chart.figures
    )
    return f"<p>{escape(chart.about)}</p><div class=panels>{''.join(panels)}</div>"


def _rows_table(rows: Sequence[Row], out: Path) -> str:
    """HTML of the table of rows: everything in results.csv, with a few columns shown at first."""
    flat = [flat_row(row) for row in rows]
    known = [metric for metric in METRICS.values() if metric.is_known(flat)]
    metrics = {metric.key: metric for metric in known if metric.in_few or metric.key in OF_TEXT}
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
        elif column == "checkpoint" and value and (out / value).is_dir():
            text = f'<a href="{_link(out / value, out)}">{escape(Path(value).name)}</a>'
        return f'<td data-v="{escape("" if value is None else str(value))}">{text}</td>'

    lines = [
        f"<tr class={row['status']}>"
        + "".join(cell(column, row) for column in few)
        + "".join(f"<td>{'' if (value := row.get(column)) is None else escape(str(value))}</td>" for column in more)
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


def _link(target: Path, out: Path) -> str:
    """A relative URL from the report to a file, which still works if both are moved together."""
    return escape(quote(os.path.relpath(target, out)))


def _time(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _summary(rows: Sequence[Row], plan: Plan, store: Store, attempts: Attempts) -> str:
    """HTML of the sweep's progress: finished rows and stages, what runs, what is missing, what can't be compared."""
    done = sum(row["status"] == "done" for row in rows)
    made = {stage_id: manifest for stage_id in plan.stages if (manifest := store.handle(stage_id).manifest())}
    hours = sum(manifest.get("wall_time_s") or 0.0 for manifest in made.values()) / 3600
    lacking = plan.lacking(made.__contains__)
    stages = f"{len(made)} of {counted(len(made) + len(lacking), 'stage')} made, in {hours:.1f} hours"
    running = [
        f"begun, without an end: {stage.kind} {stage.label} {attempt.message}"
        for stage, attempt in attempts
        if attempt.state == "open"
    ]
    lines = "".join(f"<li>{escape(line)}</li>" for line in [*running, *causes(rows)])
    told = f"<p><b>{done} of {counted(len(rows), 'row')}</b> with a result; {stages}.</p>"
    return told + (f"<div class=note><ul>{lines}</ul></div>" if lines else "")


def _table(id: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """HTML of a table; ``lines`` are cells in HTML."""
    heads = "".join(f'<th scope="col">{name}</th>' for name in head)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in line)}</tr>" for line in lines)
    return f"<div class=wide><table id={id}><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>"


def _failures(attempts: Attempts, out: Path) -> str:
    """HTML table of all attempts that ended without an artifact."""
    lines = []
    for stage, attempt in attempts:
        if attempt.state == "failed":
            logs = [f'<a href="{_link(log, out)}">{escape(log.name)}</a>' for log in attempt.logs]
            ended = "-" if attempt.ended is None else _time(attempt.ended)
            message = in_one_line(attempt.message)[:LONGEST_MESSAGE]
            texts = (f"{stage.kind} {stage.label}", str(attempt.number), ended, attempt.cause, message)
            lines.append([*map(escape, texts), " ".join([escape(attempt.where), *logs])])
    head = ("stage", "attempt", "ended", "cause", "message", "log")
    return _table("failures", head, lines) if lines else "<p>No attempt has failed.</p>"


def _provenance(rows: Sequence[Row], config: str) -> str:
    """HTML of what rows were evaluated with, and of the configuration of the last run."""
    origins = [{**found, **found.get("packages", {})} for row in rows if (found := row["provenance"])]
    names = dict.fromkeys(name for origin in origins for name in origin if name not in ("date", "packages"))
    distinct = {name: dict.fromkeys(str(origin.get(name) or "-") for origin in origins) for name in names}
    lines = [[escape(name), "<br>".join(map(escape, values))] for name, values in distinct.items()]
    details = f"<details><summary>configuration of the last run</summary><pre>{escape(config)}</pre></details>"
    return _table("provenance", ("", "of the evaluations"), lines) + (details if config else "")
