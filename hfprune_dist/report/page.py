"""The page: one file with its styles, its script and all charts and numbers; it makes no network requests."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import UTC, datetime
from html import escape
from importlib.resources import files
from pathlib import Path
from urllib.parse import quote

from hfprune_dist.planning.plan import Plan
from hfprune_dist.report.charts import QUALITY, Chart, charts, figure
from hfprune_dist.results.formats import counted
from hfprune_dist.results.metrics import METRICS, OF_TEXT
from hfprune_dist.results.rows import DONE, NOT_RUN, Row
from hfprune_dist.results.table import findings, flat_row, not_comparable
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Attempt, Cause, End, Ledger, local_log
from hfprune_dist.store.stage import Stage

# Makes the browser refuse everything that would need the network.
POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
LONGEST_MESSAGE = 500
# Stage, attempt and its end, those of a stage first to last.
Attempts = Sequence[tuple[Stage, Attempt, End | None]]


def page(out: Path, plan: Plan, rows: Sequence[Row], written: float) -> str:
    """The HTML of a report in a sweep's folder, on the rows of its plan, written at this unix time."""
    store, file = Store(out / "store"), out / "config.yaml"
    config = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    attempts = [(stage, *attempt) for stage in plan.stages.values() for attempt in Ledger(store).ends(stage.id)]
    drawn = [(chart.id, chart.title, _body(chart)) for chart in charts(rows, plan, store)]
    sections = [
        *(section for section in drawn if section[0] == QUALITY),
        ("rows-section", "Rows", _rows_table(rows, out)),
        *(section for section in drawn if section[0] != QUALITY),
        ("failures-section", "Failures", _failures(attempts, out)),
        ("provenance-section", "Where results come from", _provenance(rows, config)),
    ]
    name, links = escape(out.resolve().name), (f'<a href="#{id}">{escape(title)}</a>' for id, title, _ in sections)
    return "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f'<link rel="icon" href="data:,"><title>{name}: report</title><style>{_own("page.css")}</style>',
            f"</head><body><header><h1>{name}</h1><p>Written {_time(written)}.</p><nav>{' '.join(links)}</nav>",
            f"</header><main>{_summary(rows, plan, store, attempts)}",
            *(f'<section id="{id}"><h2>{escape(title)}</h2>{body}</section>' for id, title, body in sections),
            f"</main><script>{_own('page.js')}</script></body></html>",
        ]
    )


def _own(name: str) -> str:
    return (files("hfprune_dist.report") / name).read_text(encoding="utf-8")


def _body(chart: Chart) -> str:
    return f"<p>{escape(chart.about)}</p><div class=panels>{''.join(map(figure, chart.panels))}</div>"


def _rows_table(rows: Sequence[Row], out: Path) -> str:
    """HTML of the table of rows: everything in results.csv, with a few columns shown at first."""
    flat = [flat_row(row) for row in rows]
    known = [metric for metric in METRICS.values() if metric.is_known(flat)]
    metrics = {metric.key: metric for metric in known if metric.brief is not None or metric.key in OF_TEXT}
    few = ["label", *metrics, "checkpoint", "status"]
    shown = [*few, *dict.fromkeys(column for row in flat for column in row if column not in few)]

    def cell(column: str, row: Row) -> str:
        """HTML of a cell; ``data-v`` is the value from results.csv where people are shown something else."""
        value = row.get(column)
        raw = text = escape("" if value is None else str(value))
        if column in metrics:
            text = escape(metrics[column].shown(row))
        elif column == "label":
            text = f"<span>{text}</span>"
        elif column == "status" and value != DONE:
            text = escape(row["cause"])
        elif column == "checkpoint" and value and (out / value).is_dir():
            text = f'<a href="{_link(out / value, out)}">{escape(Path(value).name)}</a>'
        return f"<td>{text}</td>" if text == raw else f'<td data-v="{raw}">{text}</td>'

    titles = ((escape(metrics[column].header if column in metrics else column), escape(column)) for column in shown)
    heads = (f'<th scope="col"><button type=button title="{key}">{title}</button></th>' for title, key in titles)
    lines = (f"<tr class={row['status']}>{''.join(cell(column, row) for column in shown)}</tr>\n" for row in flat)
    told = "; ".join(f"{metric.header}: {metric.told}" for metric in metrics.values() if metric.meaning)
    # Cells are hidden by position: marking each one would take megabytes.
    hidden = f"#rows-section:not(:has(#all-columns:checked)) :is(th,td):nth-child(n+{len(few) + 1}){{display:none}}"
    return (
        "<p>Click a header to sort. <label><input type=checkbox id=all-columns> all columns</label></p>"
        f"<style>{hidden}</style><div class=wide><table id=rows><thead><tr>{''.join(heads)}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div><p>{escape(told)}; ±: standard error.</p>"
    )


def _link(target: Path, out: Path) -> str:
    """A relative URL from the report to a file, which still works if both are moved together."""
    return escape(quote(os.path.relpath(target, out)))


def _time(moment: float) -> str:
    return f"{datetime.fromtimestamp(moment, UTC):%Y-%m-%d %H:%M:%S} UTC"


def _summary(rows: Sequence[Row], plan: Plan, store: Store, attempts: Attempts) -> str:
    """HTML of what was found, and of the sweep's progress: what is finished, runs, failed, or can't be compared."""
    made = [manifest for stage_id in plan.stages if (manifest := store.handle(stage_id).manifest())]
    hours = sum(manifest.get("wall_time_s") or 0.0 for manifest in made) / 3600
    running = [
        f"started, not ended: {stage.kind} {stage.label}, last sign of life: "
        f"{store.handle(stage.id).heartbeat() or 'none'}"
        for stage, attempt, end in attempts
        if end is None and (attempt.runs() or not attempt.intent.job_name)  # but for jobs that wait
    ]
    lacking = [(row["cause"].endswith(NOT_RUN), f"{row['label']}: {row['cause']}") for row in rows if row["cause"]]
    notes = {
        "failed": [line for is_waiting, line in lacking if not is_waiting],
        "missing": [*running, *(line for is_waiting, line in lacking if is_waiting), *not_comparable(rows)],
    }
    done = f"<b>{sum(row['status'] == DONE for row in rows)} of {counted(len(rows), 'row')}</b> with a result"
    return "\n".join(
        [
            *(f"<p class=finding>{escape(sentence)}</p>" for sentence in findings(rows)),
            f"<p>{done}; {counted(len(made), 'stage')} of {len(plan.stages)} made, in {hours:.1f} hours.</p>",
            *(
                f"<p class='note {kind}'>{'<br>'.join(map(escape, lines))}</p>"
                for kind, lines in notes.items()
                if lines
            ),
        ]
    )


def _failures(attempts: Attempts, out: Path) -> str:
    """HTML table of all attempts that failed."""
    lines = ""
    for stage, attempt, end in attempts:
        if end is not None and end.cause not in (Cause.DONE, Cause.INTERRUPTED):
            job = f"job {attempt.job_id or 'unknown'}" if attempt.intent.job_name else ""
            nodes = "".join(f" on {run.nodes}" for run in attempt.runs()[-1:])
            found = [log for log in (*attempt.logs(), local_log(out / "logs", attempt.intent)) if log.exists()]
            logs = [f'<a href="{_link(log, out)}">{escape(log.name)}</a>' for log in found]
            message = end.in_one_line[:LONGEST_MESSAGE]
            texts = (f"{stage.kind} {stage.label}", str(attempt.intent.number), _time(end.at), end.cause, message)
            cells = (*map(escape, texts), " ".join([escape(job + nodes), *logs]))
            lines += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
    head = "".join(f"<th>{name}</th>" for name in ("stage", "attempt", "ended", "cause", "message", "log"))
    table = f"<div class=wide><table id=failures><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>"
    return table if lines else "<p>No attempt has failed.</p>"


def _provenance(rows: Sequence[Row], config: str) -> str:
    """HTML of what rows were evaluated with, and of the configuration of the last run."""
    origins = [{**found, **found.get("packages", {})} for row in rows if (found := row["provenance"])]
    names = dict.fromkeys(name for origin in origins for name in origin if name not in ("date", "packages"))
    distinct = {name: dict.fromkeys(str(origin.get(name) or "-") for origin in origins) for name in names}
    told = "\n".join(f"{name}: {', '.join(values)}" for name, values in distinct.items())
    details = f"<details><summary>configuration of the last run</summary><pre>{escape(config)}</pre></details>"
    return f"<pre>{escape(told)}</pre>" + (details if config else "")
