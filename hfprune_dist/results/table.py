"""From committed artifacts to the table of results: csv, json, markdown, and rows for the screen.

Everything is read from manifests; a cell without a result says why instead of showing a number.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.planning.plan import Cell, Plan
from hfprune_dist.results.headline import averages, headline
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import write_text

Row = dict[str, Any]


@dataclass(frozen=True)
class DenseModel:
    """What a dense row shows that no stage has measured."""

    parameters: int
    intermediate_size: int

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> DenseModel:
        """What a dense checkpoint has of it."""
        sizes = checkpoint.units.sizes(checkpoint.units.counts)
        return cls(checkpoint.parameters, sizes["intermediate_size"])


def collect_rows(plan: Plan, store: Store, dense: Mapping[str, DenseModel]) -> list[Row]:
    """One row per cell, in plan order; ``status`` is done or missing, and ``cause`` says why it is missing.

    Args:
        dense: model name -> facts of the dense checkpoint.
    """
    return [_row(cell, plan, store, dense[cell.model]) for cell in plan.cells]


def _row(cell: Cell, plan: Plan, store: Store, dense: DenseModel) -> Row:
    manifests = {stage_id: store.handle(stage_id).manifest() for stage_id in plan.upstream(cell)}
    evaluation = manifests[cell.evaluate]
    missing = plan.lacking(lambda stage_id: manifests[stage_id] is not None, [cell])
    cause = _cause(missing[0], plan, store) if missing else None
    shape = _shape(cell, manifests, dense)
    metrics: Mapping[str, Any] = evaluation["metrics"] if evaluation else {}
    fidelity = metrics.get("fidelity", {})
    return {
        "label": cell.label,
        "model": cell.model,
        "ratio": 0.0 if cell.ratio is None else cell.ratio,
        **shape,
        "method": cell.method,
        "criterion": cell.criterion,
        "recovery": cell.recovery,
        "perplexity": fidelity.get("perplexity"),
        "kl": fidelity.get("kl"),
        "top1_agreement": fidelity.get("top1_agreement"),
        "tasks": metrics.get("tasks", {}),
        **_averages(metrics.get("tasks", {})),
        "wall_time_s": _wall_time(list(manifests.values())),
        "peak_memory_bytes": _peak_memory(list(manifests.values())),
        "checkpoint": str(store.handle(cell.producers[-1]).artifact) if cell.producers else None,
        "status": "done" if cause is None else "missing",
        "cause": cause,
    }


def _cause(stage_id: str, plan: Plan, store: Store) -> str:
    """Why a stage has no artifact, in one line; a stage that waits for another names that one's reason."""
    stage = plan.stages[stage_id]
    failure = store.handle(stage_id).failure()
    if failure is not None:
        return f"{stage.kind} failed ({failure.cause}): {failure.message.strip().splitlines()[-1].strip()}"
    waiting_for = next((need for need in stage.needs if not store.handle(need).is_committed()), None)
    return _cause(waiting_for, plan, store) if waiting_for else f"{stage.kind} has not run yet"


def _shape(cell: Cell, manifests: Mapping[str, Mapping[str, Any] | None], dense: DenseModel) -> Row:
    """Reached ratio, parameters and width: the dense model's, or those that the prune stage reports."""
    if cell.ratio is None:
        return {"ratio_reached": 0.0, **asdict(dense), "intermediate_sizes": None}
    *_, prune = (found for stage_id, found in manifests.items() if stage_id.startswith("prune/"))
    metrics: Mapping[str, Any] = prune["metrics"] if prune else {}
    return {key: metrics.get(key) for key in ("ratio_reached", "parameters", "intermediate_size", "intermediate_sizes")}


def _averages(tasks: Mapping[str, Mapping[str, Any]]) -> Row:
    with_crows, without_crows = averages(tasks)
    return {"average": with_crows, "average_without_crows_pairs": without_crows}


def _wall_time(manifests: Sequence[Mapping[str, Any] | None]) -> float | None:
    """Seconds of all stages behind a row, shared ones included; None where one is missing."""
    return None if None in manifests else sum(found["wall_time_s"] for found in manifests if found is not None)


def _peak_memory(manifests: Sequence[Mapping[str, Any] | None]) -> int | None:
    """The most that one rank took in any stage behind a row; None where a stage is missing or did not say."""
    peaks = [None if found is None else found.get("peak_memory_bytes") for found in manifests]
    known = [peak for peak in peaks if peak is not None]
    return max(known) if len(known) == len(peaks) else None


def write_reports(rows: Sequence[Row], out: Path) -> None:
    """Write results.json (nested), results.csv (flat, every metric a column) and results.md (the table)."""
    write_text(out / "results.json", json.dumps({"rows": rows}, indent=1, allow_nan=False) + "\n")
    write_text(out / "results.csv", _csv([flat_row(row) for row in rows]))
    write_text(out / "results.md", markdown(rows))


def flat_row(row: Row) -> Row:
    """A row with ``<task>/<metric>`` columns in place of the nested task results."""
    flat = {key: value for key, value in row.items() if key not in ("tasks", "intermediate_sizes")}
    for task, metrics in row["tasks"].items():
        flat |= {f"{task}/{metric}": value for metric, value in metrics.items()}
    return flat


def _csv(rows: Sequence[Row]) -> str:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    tail = ["wall_time_s", "peak_memory_bytes", "checkpoint", "status", "cause"]
    columns = [column for column in columns if column not in tail] + tail
    stream = io.StringIO()
    writer = csv.DictWriter(stream, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def table(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Headers and cells of the table that people read: headline score of each task in percent, or its perplexity."""
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    headers = ["model", "ratio", "method", "reached", "recovery", "params", "width", "ppl", "KL", "agree", *tasks]
    # Averages of one score, or of none, would only repeat it.
    averaged = [key for key in ("average", "average_without_crows_pairs") if any(row[key] is not None for row in rows)]
    if all(row["average"] == row["average_without_crows_pairs"] for row in rows):
        averaged = averaged[:1]
    names = {"average": "avg", "average_without_crows_pairs": "avg w/o crows"}
    headers += [names[key] for key in averaged] + ["time"]
    return headers, [_cells(row, tasks, averaged) for row in rows]


def _cells(row: Row, tasks: Sequence[str], averaged: Sequence[str]) -> list[str]:
    shown = [row["model"], f"{row['ratio']:g}" if row["ratio"] else "dense", row["method"] or "-"]
    shown += [_number(row["ratio_reached"], "{:.4f}"), row["recovery"]]
    shown += [_number(row["parameters"], "{:,}"), _width(row)]
    if row["status"] == "missing":
        return [*shown, f"missing: {row['cause']}"]
    shown += [_number(row["perplexity"], "{:.2f}"), _number(row["kl"], "{:.4f}")]
    shown += [_number(row["top1_agreement"], "{:.3f}")]
    shown += [_task_score(row["tasks"].get(task, {})) for task in tasks]
    shown += [_percent(row[key]) for key in averaged]
    return [*shown, _number(row["wall_time_s"], "{:.0f} s")]


def _width(row: Row) -> str:
    """The layers' width, or the narrowest and widest where they differ."""
    widths = row["intermediate_sizes"]
    if not widths:
        return _number(row["intermediate_size"], "{}")
    return f"{min(widths)}" if len(set(widths)) == 1 else f"{min(widths)}-{max(widths)}"


def _number(value: float | None, template: str) -> str:
    return "-" if value is None else template.format(value)


def _task_score(metrics: Mapping[str, Any]) -> str:
    """A task's headline in percent; the word perplexity of a task that has no share to show."""
    value = headline(metrics)
    return _number(metrics.get("word_perplexity"), "{:.2f}") if value is None else _percent(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def markdown(rows: Sequence[Row]) -> str:
    """The table in GitHub's markdown."""
    headers, body = table(rows)
    lines = ["| " + " | ".join(headers) + " |", "|" + "---|" * len(headers)]
    lines += ["| " + " | ".join(cells + [""] * (len(headers) - len(cells))) + " |" for cells in body]
    return "\n".join(line.replace("\n", " ") for line in lines) + "\n"
