"""The table of results: its columns, what is said above and below it, and results.csv, results.md and results.json."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.planning.plan import NONE, OWN, VIA
from hfprune_dist.results.formats import counted, number, percent, with_error
from hfprune_dist.results.markdown import Column, escaped, markdown
from hfprune_dist.results.metrics import METRICS, Metric, headline, headline_metric
from hfprune_dist.results.rows import BY_LAYER, DONE, ENGINES, SIZES, Row
from hfprune_dist.store.atomic_files import write_json, write_text
from hfprune_dist.structures.units import plural_of

Columns = list[Column[Row]]
# The files to which rows are written.
RESULTS = ("results.csv", "results.md", "results.json")
# Fields of a row that only results.json has; results of texts, tasks and workloads get columns of their own.
NESTED = (OTHER_TEXTS, "tasks", "efficiency", ENGINES, "stages", "provenance", *BY_LAYER)
MEASURED_OTHERWISE = "not to be compared with their models' first rows: measured otherwise, or with other libraries"


def metrics_shown(rows: Sequence[Row], wide: bool) -> list[Metric]:
    """The metrics that tables of these rows have, if any row does; KL's column also says that a result is missing."""
    wanted = [metric for metric in METRICS.values() if wide or metric.brief is not None]
    return [metric for metric in wanted if metric.key == "kl" or metric.is_known(rows)]


def names(rows: Sequence[Row]) -> Columns:
    """The columns that say what a row is of."""
    found: Columns = [
        Column("model", lambda row: row["model"], is_text=True),
        Column("ratio", lambda row: f"{row['ratio']:g}" if row["ratio"] else "dense", is_text=True),
        Column("method", lambda row: row["method"] or "-", is_text=True),
        Column("recovery", lambda row: row["recovery"], is_text=True),
    ]
    return found if len({row["recovery"] for row in rows}) > 1 else found[:-1]


def columns(rows: Sequence[Row], wide: bool = False) -> Columns:
    """The columns of a table of results: everything but the numbers behind a task's headline, if it is ``wide``, or
    else a few, which take 80 characters if names have the usual lengths.
    """
    found = names(rows)
    for metric in metrics_shown(rows, wide):
        found.append(Column(metric.header, _kl if metric.key == "kl" else metric.shown))
        if wide and metric.key == "share_kept":
            found += sizes(rows)
        if wide and metric.key == "perplexity":
            tasks = dict.fromkeys(task for row in rows for task in row["tasks"])
            found += [Column(f"KL {text}", partial(_kl_on, text)) for text in other_texts(rows)]
            found += [Column(task, partial(_score, task)) for task in tasks]
    return found + ([Column("engines", _in_engines)] if any(row[ENGINES] for row in rows) else [])


def _kl(row: Row) -> str:
    return METRICS["kl"].shown(row) if row["status"] == DONE else str(row["status"])


def _kl_on(text: str, row: Row) -> str:
    return METRICS["kl"].shown(row[OTHER_TEXTS].get(text, {}))


def _score(task: str, row: Row) -> str:
    """A task's headline in percent; its word perplexity if it has no headline."""
    scores: Mapping[str, Any] = row["tasks"].get(task, {})
    value, error = headline(scores)
    return number(scores.get("word_perplexity"), ".2f") if value is None else with_error(value, error, percent)


def _in_engines(row: Row) -> str:
    checked = row[ENGINES].items()
    told = (f"{name} {'fails' if found['failure'] else number(found['difference'], '.0e')}" for name, found in checked)
    return ", ".join(told) or "-"


def other_texts(rows: Sequence[Row]) -> list[str]:
    """Names of the texts besides the first on which models were compared."""
    return list(dict.fromkeys(text for row in rows for text in row[OTHER_TEXTS]))


def sizes(rows: Sequence[Row]) -> Columns:
    """The width, and whatever else pruned rows lost some of: layers, heads, experts."""
    lost = {key for row in rows if row["ratio"] for key in row}
    shown = {header: fields for header, fields in SIZES.items() if header == "width" or lost & {*fields}}
    return [Column(header, partial(_size, fields)) for header, fields in shown.items()]


def _size(fields: Sequence[str], row: Row) -> str:
    """One number, or the lowest and the highest if layers differ."""
    found = (row.get(plural_of(field)) or [row[field]] for field in fields if field in row)
    values = next(found, [None])
    return number(values[0], "d") if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


def findings(rows: Sequence[Row]) -> list[str]:
    """A sentence for each model: which row is closest to the dense model at each ratio, and how much of it that keeps.

    Closest is the one with the lowest KL, which tells methods apart where the tasks' few questions can't.
    """
    found = []
    for model in dict.fromkeys(row["model"] for row in rows):
        done = [row for row in rows if row["model"] == model and row["status"] == DONE and row["kl"] is not None]
        dense = next((row for row in done if not row["ratio"] and row["recovery"] == NONE), None)
        alike = [row for row in done if dense and row["measured_as"] == dense["measured_as"]]
        controls = {row["recovery"]: row for row in alike if not row["ratio"]}
        ratios = sorted({row["ratio"] for row in alike if row["ratio"]})
        best = [min((row for row in alike if row["ratio"] == ratio), key=lambda row: row["kl"]) for ratio in ratios]
        if dense and best:
            # The control of "lora via 0.3" is lora's.
            sentences = (_kept(row, controls.get(row["recovery"].split()[0], dense)) for row in best)
            found.append(f"{model}: {'; '.join(sentences)}.")
    return found


def _kept(row: Row, dense: Row) -> str:
    """How much a row keeps of the dense model: of its average score after its recipe's training, if that was
    measured, so that training's gain isn't credited to pruning; else of its most likely next tokens.
    """
    share, error = row["top1_agreement"], row["top1_agreement_stderr"]
    of_what = "the dense model's most likely next tokens"
    if row["average"] is not None and dense["average"]:
        share, error, trained = row["average"] / dense["average"], None, dense["recovery"]
        of_what = "the dense model's average score" if trained == NONE else f"the average score of dense + {trained}"
        if row["average_stderr"] is not None and dense["average_stderr"] is not None:  # as if they were independent
            error = math.hypot(row["average_stderr"], share * dense["average_stderr"]) / dense["average"]
    name = row["method"] + (f" + {row['recovery']}" if row["recovery"] not in (NONE, OWN) else "")
    kept, kl = with_error(share, error, percent), METRICS["kl"].shown(row)
    return f"with {100 * row['ratio']:g} % removed, {name} keeps {kept} % of {of_what} (KL {kl})"


def notes(rows: Sequence[Row], wide: bool = False) -> list[str]:
    """What the columns of such a table mean; with all columns also how they were measured."""
    shown = metrics_shown(rows, wide)
    checked = ["engines: largest difference of log-probabilities, in nats"] * any(row[ENGINES] for row in rows)
    if not wide:
        told = [f"{metric.header}: {metric.brief}" for metric in shown if metric.brief]
        return ["; ".join([*told, *checked, "±: standard error"])]
    how = {"kl": _held_out(rows), "average": _tasks_told(rows), "decode_speed": _measured_on(rows)}
    recoveries = {word for row in rows for word in row["recovery"].split()}
    lines = ["recovery own: units go while LoRA trains"] if OWN in recoveries else []
    lines += [f"{VIA}: first pruned and trained at these ratios"] if VIA in recoveries else []
    lines += [f"{metric.header}: {metric.told}{how.get(metric.key, '')}" for metric in shown if metric.meaning]
    lines += [*checked, "width: of MLPs; ±: standard error; a task without a share of right answers: its perplexity"]
    return lines


def _held_out(rows: Sequence[Row]) -> str:
    measured = [row for row in rows if row["windows"] and row["tokens"]]
    sizes = [f"{row['windows']} windows, {row['tokens']:,} tokens" for row in measured]
    if not sizes:
        return ""
    first = "the sweep's first held-out text" if other_texts(rows) else "held-out text"
    return f"; on {first} (n = {' or '.join(dict.fromkeys(sizes))})"


def _tasks_told(rows: Sequence[Row]) -> str:
    metrics = {task: headline_metric(scores) for row in rows for task, scores in row["tasks"].items()}
    tasks = [f"{task} {metric}" for task, metric in metrics.items() if metric is not None]
    bias = ", but for crows_pairs lower is" if any(task.startswith("crows_pairs") for task in metrics) else ""
    return f"{bias}; {', '.join(tasks)}"


def _measured_on(rows: Sequence[Row]) -> str:
    measured = [row["efficiency"] for row in rows if row["efficiency"]]
    how = (f"{workload(run['runs'][-1])}; {run['engine']} on {run['device']}{_threads(run)}" for run in measured)
    return f" ({' / '.join(dict.fromkeys(how))})"


def _threads(run: Mapping[str, Any]) -> str:
    return f", {counted(run['threads'], 'thread')}" if "threads" in run else ""  # not on a GPU


def workload(run: Mapping[str, Any]) -> str:
    return f"batch {run['batch_size']}, {run['prompt_tokens']} in, {run['new_tokens']} out"


def causes(rows: Sequence[Row]) -> list[str]:
    """Lines on each row that lacks a result, or fails in an engine, and on rows that can't be compared with others."""
    told = [f"missing: {row['label']}: {row['cause']}" for row in rows if row["cause"]]
    checks = [(f"{row['label']} in {engine}", found) for row in rows for engine, found in row[ENGINES].items()]
    told += [f"fails: {where}: {found['failure']}" for where, found in checks if found["failure"]]
    return [*told, *not_comparable(rows)]


def not_comparable(rows: Sequence[Row]) -> list[str]:
    """A line on rows whose scores can't be compared with their model's first row's: other weights, text or tasks."""
    first: dict[str, str] = {}
    rows = [row for row in rows if row["status"] == DONE]
    others = [row["label"] for row in rows if first.setdefault(row["model"], row["measured_as"]) != row["measured_as"]]
    return [f"{MEASURED_OTHERWISE}: {', '.join(others)}"] if others else []


def write_reports(rows: Sequence[Row], out: Path) -> None:
    """Write results.json (nested), results.csv (flat, every metric a column) and results.md (the table)."""
    write_json(out / "results.json", {"rows": rows}, sort_keys=False)
    flat = [flat_row(row) for row in rows]
    stream = io.StringIO()
    writer = csv.DictWriter(stream, dict.fromkeys(name for row in flat for name in row), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_text(out / "results.csv", stream.getvalue())
    write_text(out / "results.md", report(rows))


def flat_row(row: Row) -> Row:
    """A row with columns ``fidelity/<text>/<metric>``, ``<task>/<metric>`` and so on in place of nested results."""
    flat = {key: value for key, value in row.items() if key not in NESTED}
    nested = {f"fidelity/{text}": found for text, found in row[OTHER_TEXTS].items()} | row["tasks"]
    nested |= {f"{ENGINES}/{engine}": found for engine, found in row[ENGINES].items()}
    nested |= {f"efficiency/{workload(run)}": dict(_medians(run)) for run in (row["efficiency"] or {}).get("runs", ())}
    return flat | {f"{name}/{key}": value for name, found in nested.items() for key, value in found.items()}


def _medians(run: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in {**run["model"], **{key: run[key] for key in ("first_token_speed", "decode_speed")}}.items():
        yield name, value["median"] if isinstance(value, Mapping) else value


def report(rows: Sequence[Row]) -> str:
    """Markdown: what was found, a table of a few columns, and one of all columns, each with notes."""
    few, everything = (markdown(rows, columns(rows, wide)) for wide in (False, True))
    above = (f"{escaped(found)}\n\n" for found in findings(rows))
    below = _listed([*notes(rows), *causes(rows)])
    return f"{''.join(above)}{few}\n{below}\n## All columns\n\n{everything}\n{_listed(notes(rows, wide=True))}"


def _listed(paragraphs: Sequence[str]) -> str:
    return "".join(f"- {escaped(paragraph)}\n" for paragraph in paragraphs)
