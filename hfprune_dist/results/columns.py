"""The columns of a sweep's table: a few by default, or all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.results.against_dense import AVERAGES
from hfprune_dist.results.column import Column
from hfprune_dist.results.costs import MEASURES, OWN_STAGES, SHARED_STAGES
from hfprune_dist.results.formats import (
    byte_count,
    count,
    duration,
    flop_count,
    hours,
    latency,
    measured,
    number,
    percent,
    percent_measured,
)
from hfprune_dist.results.headline import headline, headline_error
from hfprune_dist.results.rows import EXPERT_WIDTHS, KEY_VALUE_HEADS, LAYERS, NUM_EXPERTS, Row
from hfprune_dist.structures.units import plural_of

Columns = list[Column[Row]]


def few_columns(rows: Sequence[Row], with_errors: bool = True) -> Columns:
    """The default columns, which fit a terminal 80 characters wide if names have the usual lengths.

    Args:
        with_errors: also show the standard error of KL.
    """
    columns = [*_names(rows), Column("params", lambda row: count(row["parameters"])), Column("kept%", _kept)]
    columns += [_kl(rows if with_errors else [], digits=3)]
    if any(row["average"] is not None for row in rows):
        columns += [_average(rows, "average", "avg")]
    columns += [Column("size", lambda row: byte_count(row["weight_bytes"])), *_speed(rows)]
    return [*columns, Column("time", lambda row: duration(row["own_time_s"]))]


def all_columns(rows: Sequence[Row]) -> Columns:
    """Columns for everything in the rows except the numbers behind a task's headline."""
    columns = [*_names(rows), Column("reached", lambda row: number(row["ratio_reached"], ".4f"))]
    columns += [Column("params", lambda row: number(row["parameters"], ","))]
    columns += [Column("size", lambda row: byte_count(row["weight_bytes"])), *_sizes(rows)]
    columns += [
        _kl(rows, digits=4),
        _measure(rows, "agree", "top1_agreement", 3),
        _measure(rows, "ppl", "perplexity", 2),
    ]
    columns += [*_other_texts(rows), *_tasks(rows), *_averages(rows), *_shares_of_dense(rows)]
    columns += [*_speed(rows), *_efficiency(rows), *_costs(rows)]
    columns += [Column("time", lambda row: duration(row["own_time_s"]))]
    columns += [Column("shared", lambda row: duration(row["shared_time_s"]))]
    return [*columns, Column("memory", lambda row: byte_count(row["peak_memory_bytes"]))]


def _speed(rows: Sequence[Row]) -> Columns:
    """The column of decoding speed, if it was measured for any row."""
    known = any(row["decode_speed"] is not None for row in rows)
    return [Column("speed", lambda row: number(row["decode_speed"], ".2f"))] * known


def _speeds(row: Row) -> str:
    """The lowest and the highest speed of a measurement."""
    if row["decode_speed"] is None:
        return "-"
    return f"{row['decode_speed_min']:.2f}-{row['decode_speed_max']:.2f}"


def _efficiency(rows: Sequence[Row]) -> Columns:
    """The other measurements of an efficiency stage, and the cost of a token."""
    if not _speed(rows):
        return []
    return [
        Column("speeds", _speeds),
        Column("tokens/s", lambda row: count(row["decode_tokens_per_s"])),
        Column("first token", lambda row: latency(row["time_to_first_token_s"])),
        Column("generating", lambda row: byte_count(row["generation_memory_bytes"])),
        Column("FLOPs/token", lambda row: count(row["flops_per_token"])),
        Column("cache/token", lambda row: byte_count(row["cache_bytes_per_token"])),
    ]


def _names(rows: Sequence[Row]) -> Columns:
    columns: Columns = [
        Column("model", lambda row: row["model"], is_text=True),
        Column("ratio", lambda row: f"{row['ratio']:g}" if row["ratio"] else "dense", is_text=True),
        Column("method", lambda row: row["method"] or "-", is_text=True),
    ]
    differs = len({row["recovery"] for row in rows}) > 1
    return columns + [Column("recovery", lambda row: row["recovery"], is_text=True)] * differs


def _kept(row: Row) -> str:
    return percent(None if row["ratio_reached"] is None else 1 - row["ratio_reached"])


def _sizes(rows: Sequence[Row]) -> Columns:
    """Fields of config.json: layers and heads if any row lost some, experts if there are any, and the width."""
    optional = {"layers": LAYERS, "KV heads": KEY_VALUE_HEADS, "experts": NUM_EXPERTS} | EXPERT_WIDTHS
    shown = {header: field for header, field in optional.items() if any(field in row for row in rows)}
    shown["width"] = "intermediate_size"
    return [Column(header, partial(_size, field=field)) for header, field in shown.items()]


def _size(row: Row, field: str) -> str:
    """The layers' width or heads; the lowest and the highest number if layers differ."""
    values = row.get(plural_of(field))
    if not values:
        return number(row.get(field), "d")
    return f"{min(values)}" if len(set(values)) == 1 else f"{min(values)}-{max(values)}"


# Measures. If no row has a standard error, as with older evaluations, none is shown.


def _has_errors(rows: Sequence[Row], name: str) -> bool:
    return any(row[f"{name}_stderr"] is not None for row in rows)


def _measure(rows: Sequence[Row], header: str, name: str, digits: int) -> Column[Row]:
    if _has_errors(rows, name):
        return Column(header, lambda row: measured(row[name], row[f"{name}_stderr"], digits))
    return Column(header, lambda row: number(row[name], f".{digits}f"))


def _kl(rows: Sequence[Row], digits: int) -> Column[Row]:
    """The column of KL, which also says if a row's result is missing."""
    measure = _measure(rows, "KL", "kl", digits)
    return Column(measure.header, lambda row: "missing" if row["status"] == "missing" else measure.show(row))


def _other_texts(rows: Sequence[Row]) -> Columns:
    """The column of KL on the second text, or of the largest KL on several further texts."""
    others = list(dict.fromkeys(text for row in rows for text in row[OTHER_TEXTS]))
    if not others:
        return []
    header = f"KL {others[0]}" if len(others) == 1 else "worst other KL"
    return [Column(header, partial(_worst, is_named=len(others) > 1))]


def _worst(row: Row, is_named: bool) -> str:
    compared: Mapping[str, Row] = row[OTHER_TEXTS]
    if not compared:
        return "-"
    # A KL that isn't known was too large to be represented.
    text = max(compared, key=lambda it: math.inf if compared[it]["kl"] is None else compared[it]["kl"])
    value, error = compared[text]["kl"], compared[text]["kl_stderr"]
    told = number(value, ".4f") if error is None else measured(value, error, 4)
    return told + (f" ({text})" if is_named else "")


def _tasks(rows: Sequence[Row]) -> Columns:
    tasks = list(dict.fromkeys(task for row in rows for task in row["tasks"]))
    return [Column(task, partial(_score, task=task)) for task in tasks]


def _score(row: Row, task: str) -> str:
    """A task's headline in percent; its word perplexity if it has no headline."""
    metrics: Mapping[str, Any] = row["tasks"].get(task, {})
    value = headline(metrics)
    if value is None:
        return number(metrics.get("word_perplexity"), ".2f")
    return percent_measured(value, headline_error(metrics))


def _averages(rows: Sequence[Row]) -> Columns:
    """The columns of averages that are known; a single one if the average without CrowS-Pairs is the same."""
    names = {"average": "avg", "average_without_crows_pairs": "avg w/o crows"}
    known = [key for key in names if any(row[key] is not None for row in rows)]
    if all(row["average"] == row["average_without_crows_pairs"] for row in rows):
        known = known[:1]
    return [_average(rows, key, names[key]) for key in known]


def _average(rows: Sequence[Row], key: str, header: str) -> Column[Row]:
    if _has_errors(rows, key):
        return Column(header, lambda row: percent_measured(row[key], row[f"{key}_stderr"]))
    return Column(header, lambda row: percent(row[key]))


def _shares_of_dense(rows: Sequence[Row]) -> Columns:
    """Columns for the average as shares of the dense model's; without CrowS-Pairs, if that average differs."""
    name = AVERAGES[any(row[AVERAGES[0]] != row[AVERAGES[1]] for row in rows)]
    shown = {
        "avg % of dense": f"{name}_of_dense",
        "before recovery": f"{name}_of_dense_before_recovery",
    }
    return [
        Column(header, lambda row, key=key: percent(row[key]))  # type: ignore[misc]
        for header, key in shown.items()
        if any(row[key] is not None for row in rows)
    ]


def _costs(rows: Sequence[Row]) -> Columns:
    """Columns for the cost of training: that of a row's own stages, and that of the stages it shares."""
    shown = {"tokens": count, "FLOPs": flop_count, "device-h": hours, "wasted-h": hours}
    columns: Columns = []
    for whose in (OWN_STAGES, SHARED_STAGES):
        prefix = "" if whose == OWN_STAGES else f"{whose} "
        for (header, form), measure in zip(shown.items(), MEASURES, strict=True):
            columns.append(Column(prefix + header, partial(_cost, form=form, key=f"{whose}_training_{measure}")))
    return columns


def _cost(row: Row, form: Callable[[float | None], str], key: str) -> str:
    return form(row[key])
