"""The table of results: its columns, the notes below it, and the files results.csv, results.md and results.json."""

from __future__ import annotations

import csv
import io
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.planning.plan import OWN
from hfprune_dist.results.formats import counted, duration, number, percent, with_error
from hfprune_dist.results.headline import headline, headline_error, headline_metric, is_bias_task
from hfprune_dist.results.markdown import Column, escaped, markdown
from hfprune_dist.results.metrics import METRICS, Metric
from hfprune_dist.results.rows import BY_LAYER, OPTIONAL_SIZES, Row
from hfprune_dist.store.atomic_files import write_json, write_text
from hfprune_dist.structures.units import plural_of

Columns = list[Column[Row]]
# The files to which rows are written.
RESULTS = ("results.csv", "results.md", "results.json")
# Fields of a row that only results.json has; results of texts, tasks and workloads get columns of their own.
NESTED = (OTHER_TEXTS, "tasks", "samples", "efficiency", "stages", "provenance", *BY_LAYER)
# Columns that come last.
LAST = (
    *("training_tokens", "training_flops", "device_hours", "training_device"),
    *("own_time_s", "shared_time_s", "wall_time_s", "peak_memory_bytes", "checkpoint"),
    *("measured_as", "status", "cause", "speed_cause"),
)
MEASURED_OTHERWISE = "not to be compared with the first rows of their models, since measured in another way"


def metrics_shown(rows: Sequence[Row], wide: bool) -> list[Metric]:
    """The metrics that tables of these rows have: a few or all, as far as any row has them. The column of KL also says
    that a result is missing.
    """
    known = [it for it in METRICS.values() if (wide or it.in_few) and (it.key == "kl" or it.is_known(rows))]
    same = all(row["average"] == row["average_without_crows_pairs"] for row in rows)
    return [it for it in known if it.key != "average_without_crows_pairs" or not same]


def columns(rows: Sequence[Row], wide: bool = False, with_errors: bool = True) -> Columns:
    """The columns of a table of results.

    Args:
        wide: everything but the numbers behind a task's headline; otherwise a few columns, which fit a terminal 80
            characters wide if names have the usual lengths.
        with_errors: also show standard errors.
    """
    found: Columns = [
        Column("model", lambda row: row["model"], is_text=True),
        Column("ratio", lambda row: f"{row['ratio']:g}" if row["ratio"] else "dense", is_text=True),
        Column("method", lambda row: row["method"] or "-", is_text=True),
    ]
    if len({row["recovery"] for row in rows}) > 1:
        found.append(Column("recovery", lambda row: row["recovery"], is_text=True))
    for metric in metrics_shown(rows, wide):
        shown = partial(metric.shown, with_errors=with_errors or metric.key != "kl")
        found.append(Column(metric.header, partial(_kl, shown) if metric.key == "kl" else shown))
        if wide and metric.key == "share_kept":
            found += sizes(rows)
        if wide and metric.key == "perplexity":
            found += [*_other_texts(rows), *_tasks(rows)]
    return found


def _kl(shown: Any, row: Row) -> str:
    return "missing" if row["status"] == "missing" else str(shown(row))


def sizes(rows: Sequence[Row]) -> Columns:
    """Fields of config.json: layers and heads if any row lost some, experts if there are any, and the width."""
    lost = {header: field for header, field in OPTIONAL_SIZES.items() if any(field in row for row in rows)}
    return [Column(header, partial(_size, field)) for header, field in {**lost, "width": "intermediate_size"}.items()]


def _size(field: str, row: Row) -> str:
    """The layers' width or heads; the lowest and the highest number if layers differ."""
    values = row.get(plural_of(field)) or [row.get(field)]
    return number(values[0], "d") if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


def _other_texts(rows: Sequence[Row]) -> Columns:
    """The column of KL on the second text, or of the largest KL on several further texts."""
    others = _other_texts_of(rows)
    header = f"KL {others[0]}" if len(others) == 1 else "worst other KL"
    return [Column(header, partial(_worst, len(others) > 1))] if others else []


def _other_texts_of(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(text for row in rows for text in row[OTHER_TEXTS]))


def _worst(is_named: bool, row: Row) -> str:
    compared: Mapping[str, Row] = row[OTHER_TEXTS]
    if not compared:
        return "-"
    # A KL that isn't known was too large to be represented.
    text = max(compared, key=lambda name: math.inf if compared[name]["kl"] is None else compared[name]["kl"])
    return METRICS["kl"].shown(compared[text]) + (f" ({text})" if is_named else "")


def _tasks(rows: Sequence[Row]) -> Columns:
    tasks = dict.fromkeys(task for row in rows for task in row["tasks"])
    return [Column(task, partial(_score, task)) for task in tasks]


def _score(task: str, row: Row) -> str:
    """A task's headline in percent; its word perplexity if it has no headline."""
    scores: Mapping[str, Any] = row["tasks"].get(task, {})
    value = headline(scores)
    if value is None:
        return number(scores.get("word_perplexity"), ".2f")
    return with_error(value, headline_error(scores), percent)


# Notes.


def notes(rows: Sequence[Row], wide: bool = False) -> list[str]:
    """What is to be said below the table with these columns: what they mean, over how many examples, shared costs.

    Args:
        wide: only what notes on the table of a few columns don't say.
    """
    if not rows:
        return []
    if wide:
        others = [it for it in metrics_shown(rows, wide) if it not in metrics_shown(rows, wide=False)]
        told = [f"{it.header}: {it.told}" for it in others]
        return ["; ".join([*told, "width: of MLPs; a task without a share of right answers: its perplexity"])]
    shown = {it: _context(it, rows) for it in metrics_shown(rows, wide)}
    told = [f"{it.header}: {it.told}{context}" for it, context in shown.items() if context]
    told += ["; ".join(f"{it.header}: {it.told}" for it, context in shown.items() if it.meaning and not context)]
    if any(row["recovery"] == OWN for row in rows):
        told.insert(
            0, "recovery own: units went while LoRA trained, on the rows and in the steps of the others' recovery"
        )
    return told


def _context(metric: Metric, rows: Sequence[Row]) -> str:
    """What else there is to say about a metric in these rows."""
    match metric.key:
        case "kl":
            return _held_out(rows)
        case "average":
            return _tasks_told(rows)
        case "decode_speed":
            how = dict.fromkeys(_measured_on(row["efficiency"]) for row in rows if row["efficiency"])
            return f" ({' / '.join(how)})"
        case "own_time_s":
            shared = [f"{model} {duration(seconds)}" for model, seconds in _shared_times(rows).items()]
            return f"; those that rows share took: {', '.join(shared)}" if shared else ""
    return ""


def _held_out(rows: Sequence[Row]) -> str:
    sizes = {noun: _range(row[f"{noun}s"] for row in rows) for noun in ("window", "token")}
    where = ", ".join(counted(size, noun) for noun, size in sizes.items() if size)
    if not where:
        return ""
    others = _other_texts_of(rows)
    first = f", the sweep's first (others: {', '.join(others)})" if others else ""
    return f"; held-out text{first} (n = {where}); ±: standard error over windows"


def _tasks_told(rows: Sequence[Row]) -> str:
    metrics = {task: headline_metric(scores) for row in rows for task, scores in row["tasks"].items()}
    samples = {task: _range(row["samples"].get(task) for row in rows) for task in metrics}
    tasks = [
        f"{task} {metric}" + (f" (n = {samples[task]})" if samples[task] else "")
        for task, metric in metrics.items()
        if metric is not None
    ]
    bias = ", but for crows_pairs lower is" if any(map(is_bias_task, metrics)) else ""
    return f"{bias}; ±: standard error; {', '.join(tasks)}"


def _measured_on(efficiency: Mapping[str, Any]) -> str:
    """How speed was measured."""
    told = f"{workload(efficiency['runs'][-1])}; {efficiency['device']}"
    if "threads" not in efficiency:
        return told
    threads, cores = efficiency["threads"], efficiency.get("cores", efficiency["threads"])
    return f"{told}, threads: {threads}" + (f" on {counted(cores, 'core')}" if cores < threads else "")


def workload(run: Mapping[str, Any]) -> str:
    """What was generated."""
    return f"batch {run['batch_size']}, {run['prompt_tokens']} in, {run['new_tokens']} out"


def _shared_times(rows: Sequence[Row]) -> dict[str, float]:
    """Model -> seconds of all stages that several of its rows need, as far as known."""
    behind = Counter(stage_id for row in rows for stage_id in row["stages"])
    shared: dict[str, dict[str, float]] = {}
    for row in rows:
        for stage_id, seconds in row["stages"].items():
            if behind[stage_id] > 1 and seconds is not None:
                shared.setdefault(row["model"], {})[stage_id] = seconds
    return {model: sum(found.values()) for model, found in shared.items()}


def _range(values: Iterable[int | None]) -> str:
    """The lowest and highest of the known values; empty if none is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    return f"{min(known):,}" if min(known) == max(known) else f"{min(known):,}-{max(known):,}"


def causes(rows: Sequence[Row]) -> list[str]:
    """Lines on each row without a result, on rows that can't be compared with others, and on missing speeds."""
    unmeasured: dict[str, list[str]] = {}
    for row in rows:
        if row["speed_cause"] is not None:
            unmeasured.setdefault(row["speed_cause"], []).append(row["label"])
    speeds = [f"speed missing: {', '.join(labels)}: {cause}" for cause, labels in unmeasured.items()]
    return [*missing(rows), *not_comparable(rows), *speeds]


def missing(rows: Sequence[Row]) -> list[str]:
    """A line on each row without a result."""
    return [f"missing: {row['label']}: {row['cause']}" for row in rows if row["status"] == "missing"]


def not_comparable(rows: Sequence[Row]) -> list[str]:
    """A line on the rows that ``measured_otherwise`` finds."""
    others = measured_otherwise(rows)
    return [f"{MEASURED_OTHERWISE}: {', '.join(others)}"] if others else []


def measured_otherwise(rows: Sequence[Row]) -> list[str]:
    """Labels of rows whose scores can't be compared with their model's first row's: other weights, text or tasks."""
    first: dict[str, str] = {}
    return [row["label"] for row in rows if first.setdefault(row["model"], row["measured_as"]) != row["measured_as"]]


# Files.


def write_reports(rows: Sequence[Row], out: Path) -> None:
    """Write results.json (nested), results.csv (flat, every metric a column) and results.md (the table)."""
    write_json(out / "results.json", {"rows": rows}, sort_keys=False)
    write_text(out / "results.csv", _csv([flat_row(row) for row in rows]))
    write_text(out / "results.md", report(rows))


def flat_row(row: Row) -> Row:
    """A row with columns ``fidelity/<text>/<metric>``, ``<task>/<metric>`` and ``efficiency/<workload>/<metric>``
    instead of nested results.
    """
    flat = {key: value for key, value in row.items() if key not in NESTED}
    nested = {f"fidelity/{text}": found for text, found in row[OTHER_TEXTS].items()} | row["tasks"]
    nested |= {f"efficiency/{workload(run)}": dict(_medians(run)) for run in (row["efficiency"] or {}).get("runs", ())}
    for name, found in nested.items():
        flat |= {f"{name}/{metric}": value for metric, value in found.items()}
    return flat | {f"{task}/samples": row["samples"][task] for task in row["tasks"] if task in row["samples"]}


def _medians(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in {**run["model"], **{it: run[it] for it in ("first_token_speed", "decode_speed")}}.items():
        yield name, value["median"] if isinstance(value, Mapping) else value


def _csv(rows: Sequence[Row]) -> str:
    names = list(dict.fromkeys(column for row in rows for column in row))
    names = [*(column for column in names if column not in LAST), *LAST]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue()


def report(rows: Sequence[Row]) -> str:
    """Markdown: a table of a few columns, then a table of all columns, each with notes."""
    few, everything = (markdown(rows, columns(rows, wide)) for wide in (False, True))
    below_few, below_all = _listed([*notes(rows), *causes(rows)]), _listed(notes(rows, wide=True))
    return f"{few}\n{below_few}\n## All columns\n\n{everything}\n{below_all}"


def _listed(paragraphs: Sequence[str]) -> str:
    return "".join(f"- {escaped(it)}\n" for it in paragraphs)
