"""Files with the table of results: csv, json and markdown."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.results.column import markdown
from hfprune_dist.results.columns import all_columns, few_columns
from hfprune_dist.results.costs import MEASURES, OWN_STAGES, SHARED_STAGES
from hfprune_dist.results.efficiency import by_workload
from hfprune_dist.results.markdown import escaped
from hfprune_dist.results.notes import causes, notes, wide_notes
from hfprune_dist.results.rows import BY_LAYER, Row
from hfprune_dist.store.atomic_files import write_json, write_text

# Fields of a row that only results.json has; results of texts, tasks and workloads get columns of their own.
NESTED = (
    *(OTHER_TEXTS, "tasks", "samples", "tasks_of_dense", "efficiency", "stages", "costs", "provenance"),
    *BY_LAYER,
)
_OF_ROW = tuple(f"{whose}_training_{measure}" for whose in (OWN_STAGES, SHARED_STAGES) for measure in MEASURES)
_TIMES = ("own_time_s", "shared_time_s", "wall_time_s")
LAST = (
    *(*_OF_ROW, "training_device", *_TIMES, "peak_memory_bytes", "checkpoint"),
    *("measured_as", "status", "cause", "speed_cause"),
)


# The files to which rows are written.
RESULTS = ("results.csv", "results.md", "results.json")


def write_reports(rows: Sequence[Row], out: Path) -> None:
    """Write results.json (nested), results.csv (flat, every metric a column) and results.md (the table)."""
    write_json(out / "results.json", {"rows": rows}, sort_keys=False)
    write_text(out / "results.csv", _csv([flat_row(row) for row in rows]))
    write_text(out / "results.md", report(rows))


def flat_row(row: Row) -> Row:
    """A row with ``fidelity/<text>/<metric>``, ``<task>/<metric>``, ``training/<kind>/<cost>`` and
    ``efficiency/<workload>/<metric>`` columns instead of nested results.
    """
    flat = {key: value for key, value in row.items() if key not in NESTED}
    nested = {f"fidelity/{text}": metrics for text, metrics in row[OTHER_TEXTS].items()} | row["tasks"]
    nested |= {f"training/{kind}": cost for kind, cost in row["costs"].items()}
    for name, metrics in nested.items():
        flat |= {f"{name}/{metric}": value for metric, value in metrics.items()}
    flat |= by_workload(row)
    of_tasks = {"samples": row["samples"], "of_dense": row["tasks_of_dense"]}
    for name, known in of_tasks.items():
        flat |= {f"{task}/{name}": known[task] for task in row["tasks"] if task in known}
    return flat


def _csv(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    columns = [*(column for column in columns if column not in LAST), *LAST]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def report(rows: Sequence[Row]) -> str:
    """Markdown: a table of a few columns with notes, then a table of all columns."""
    few, everything = (markdown(rows, columns) for columns in (few_columns(rows), all_columns(rows)))
    below = _listed([*notes(rows), *causes(rows)])
    return f"{few}\n{below}\n## All columns\n\n{everything}\n{_listed(wide_notes(rows))}"


def _listed(paragraphs: Sequence[str]) -> str:
    return "".join(f"- {escaped(it)}\n" for it in paragraphs)
