"""The table of a report: everything in results.csv, with a few columns shown at first; clicking a header sorts it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hfprune_dist.planning.plan import Cell
from hfprune_dist.report.evidence import Evidence
from hfprune_dist.results.checkpoint_names import checkpoint_names
from hfprune_dist.results.formats import count, duration, measured, number, percent, percent_measured
from hfprune_dist.results.named_checkpoints import CHECKPOINTS
from hfprune_dist.results.rows import Row
from hfprune_dist.results.table import flat_row
from hfprune_dist.store.stage import kind_of


def _measured(row: Row, name: str, digits: int) -> str:
    value, error = row[name], row[f"{name}_stderr"]
    return number(value, f".{digits}f") if error is None else measured(value, error, digits)


def _percent_measured(row: Row, name: str) -> str:
    value, error = row[name], row[f"{name}_stderr"]
    return percent(value) if error is None else percent_measured(value, error)


# Columns shown at first, if any row has a value: their headers, and functions that return the text for a row.
FEW: dict[str, tuple[str, Callable[[Row], str]]] = {
    "label": ("row", lambda row: str(row["label"])),
    "ratio_reached": ("% removed", lambda row: percent(row["ratio_reached"])),
    "parameters": ("parameters", lambda row: count(row["parameters"])),
    "kl": ("KL", lambda row: _measured(row, "kl", 4)),
    "top1_agreement": ("% agree", lambda row: _percent_measured(row, "top1_agreement")),
    "perplexity": ("perplexity", lambda row: _measured(row, "perplexity", 2)),
    "average": ("average %", lambda row: _percent_measured(row, "average")),
    "decode_speed": ("speed", lambda row: number(row["decode_speed"], ".2f")),
    "own_time_s": ("time", lambda row: duration(row["own_time_s"])),
    "checkpoint": ("checkpoint", lambda row: _short(row["checkpoint"])),
    "status": ("status", lambda row: f"missing: {row['cause']}" if row["cause"] else str(row["status"])),
}


def rows_table(evidence: Evidence) -> str:
    """HTML of the table."""
    flat = [flat_row(row) for row in evidence.rows]
    few = [column for column in FEW if any(row[column] is not None for row in flat)]
    more = list(dict.fromkeys(column for row in flat for column in row if column not in few))
    names = {cell.label: name for name, cell in checkpoint_names(evidence.plan.cells).items()}
    headers = "".join([*map(_header, few), '<th scope="col" class=logs>logs</th>', *map(_header, more)])
    body = "\n".join(
        _line(
            row,
            [
                *_few(few, row, names.get(cell.label, ""), evidence),
                _logs(cell, evidence),
                *(_exact(it.get(column)) for column in more),
            ],
        )
        for row, it, cell in zip(evidence.rows, flat, evidence.plan.cells, strict=True)
    )
    head = f"<thead><tr>{headers}</tr></thead>"
    return f"{_hidden(len(few))}<table id=rows>{head}<tbody>\n{body}\n</tbody></table>"


def _hidden(few: int) -> str:
    """Styles that hide cells by position: marking each cell as hidden would take megabytes."""
    rest = f"#rows:not(.all) :is(th,td):nth-child(n+{few + 2}){{display:none}}"
    return f"<style>{rest}@media print{{#rows :is(th,td):nth-child(n+{few + 1}){{display:none}}}}</style>"


def _header(column: str) -> str:
    name = escape(FEW[column][0] if column in FEW else column)
    return f'<th scope="col"><button type=button title="{escape(column)}">{name}</button></th>'


def _line(row: Row, cells: Sequence[str]) -> str:
    kind = "" if row["status"] == "done" else " class=missing"
    return f'<tr data-model="{escape(row["model"])}"{kind}>{"".join(cells)}</tr>'


def _exact(value: Any) -> str:
    """HTML of a cell with the value from results.csv."""
    return f"<td>{'' if value is None else escape(str(value))}</td>"


def _few(columns: Sequence[str], row: Row, name: str, evidence: Evidence) -> Iterator[str]:
    """Yield HTML of cells with values formatted for people; ``data-v`` is the value from results.csv.

    Args:
        name: name of the row's checkpoint.
    """
    for column in columns:
        value, text = row[column], escape(FEW[column][1](row))
        if column == "checkpoint" and value is not None and Path(value).is_dir():
            text = f'<a href="{link(_named(name, Path(value), evidence.out), evidence.out)}">{text}</a>'
        text = f"<span>{text}</span>" if column == "label" else text
        yield f'<td data-v="{escape("" if value is None else str(value))}">{text}</td>'


def _named(name: str, artifact: Path, out: Path) -> Path:
    """The folder with the checkpoint's name and card; the artifact's own if that is missing or another's."""
    folder = out / CHECKPOINTS / name
    return folder if (folder / "config.json").resolve().parent == artifact.resolve() else artifact


def _short(checkpoint: str | None) -> str:
    if checkpoint is None:
        return "-"
    *_, kind, fingerprint = Path(checkpoint).parts
    return f"{kind}/{fingerprint[:6]}"


def _logs(cell: Cell, evidence: Evidence) -> str:
    """HTML of links to the newest log of every stage behind a row."""
    newest = [(stage_id, _newest_log(stage_id, evidence)) for stage_id in evidence.plan.upstream(cell)]
    links = [f'<a href="{link(log, evidence.out)}">{kind_of(stage_id)}</a>' for stage_id, log in newest if log]
    return f"<td class=logs>{' '.join(links) or '-'}</td>"


def _newest_log(stage_id: str, evidence: Evidence) -> Path | None:
    logs = [log for attempt in evidence.attempts[stage_id] for log in attempt.logs]
    return logs[-1] if logs else None


def link(target: Path, out: Path) -> str:
    """A relative URL from the report to a file, which still works if both are moved together."""
    return escape(quote(os.path.relpath(target, out)))
