"""Methods compared over sweeps that differ in their seed: means and spreads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from hfprune_dist.planning.plan import NONE
from hfprune_dist.results.column import Column, markdown
from hfprune_dist.results.formats import byte_count, duration, measured, number
from hfprune_dist.results.known import all_or_none
from hfprune_dist.results.markdown import escaped
from hfprune_dist.results.rows import Row

MEASURES = ("kl", "top1_agreement", "perplexity", "average")


@dataclass(frozen=True)
class Spread:
    """Mean and standard deviation over sweeps; the deviation is None for a single sweep."""

    mean: float
    deviation: float | None


@dataclass(frozen=True)
class Comparison:
    """Results of one method, on one model at one ratio.

    Attributes:
        measures: kl, top1_agreement, perplexity, and the average of the tasks' scores; None if the value isn't a number
            in some sweep.
        kl_share: KL divided by the reference method's KL in the same sweep, over sweeps with a reference; None without
            any, and if one of the two isn't a number in one of them, or the reference's is 0. Where pruning and
            recovery are one training, the reference is the recovered one.
        sweeps: number of sweeps with a result.
        sweeps_with_reference: number of those behind ``kl_share``.
        wall_time_s: time of all stages behind a row, shared ones included; mean over the rows for which it is known.
        peak_memory_bytes: the highest peak of a rank in any of these stages, None if none was recorded.
    """

    model: str
    ratio: float
    method: str
    recovery: str
    measures: Mapping[str, Spread | None]
    kl_share: Spread | None
    sweeps: int
    sweeps_with_reference: int
    wall_time_s: float | None
    peak_memory_bytes: int | None


def compare_methods(sweeps: Sequence[Sequence[Row]], reference: str) -> list[Comparison]:
    """Group the finished rows of several sweeps by model, ratio, method and recovery.

    Models come in order of first appearance, each with its ratios from low to high, and their methods in order of first
    appearance.
    """
    groups: dict[tuple[str, float, str, str], list[tuple[Row, Row | None]]] = {}
    for rows in sweeps:
        done = [row for row in rows if row["status"] == "done"]
        references = {_place(row): row for row in done if row["method"] == reference}
        for row in done:
            key = (row["model"], row["ratio"], row["method"] or "dense", row["recovery"])
            groups.setdefault(key, []).append((row, references.get(_place(row))))
    models = list(dict.fromkeys(model for model, *_ in groups))
    in_order = sorted(groups, key=lambda key: (models.index(key[0]), key[1]))
    return [_comparison(*key, groups[key]) for key in in_order]


def _place(row: Row) -> tuple[str, float, bool, str]:
    """Key shared by rows of a sweep that can be compared; rows of its earlier runs may be measured in another way."""
    return row["model"], row["ratio"], row["recovery"] != NONE, row["measured_as"]


def _comparison(
    model: str, ratio: float, method: str, recovery: str, members: Sequence[tuple[Row, Row | None]]
) -> Comparison:
    rows = [row for row, _ in members]
    shares = [_share(row["kl"], reference["kl"]) for row, reference in members if reference is not None]
    times = [row["wall_time_s"] for row in rows if row["wall_time_s"] is not None]
    return Comparison(
        model,
        ratio,
        method,
        recovery,
        {name: _spread_of_all([row[name] for row in rows]) for name in MEASURES},
        _spread_of_all(shares) if shares else None,
        len(rows),
        len(shares),
        statistics.fmean(times) if times else None,
        max((row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"]), default=None),
    )


def _share(kl: float | None, reference: float | None) -> float | None:
    return kl / reference if kl is not None and reference else None


def _spread_of_all(values: Sequence[float | None]) -> Spread | None:
    """The spread of the values; None if one of them isn't a number."""
    known = all_or_none(values)
    return spread(known) if known is not None and all(map(math.isfinite, known)) else None


def spread(values: Iterable[float]) -> Spread:
    """Mean and sample standard deviation."""
    listed = list(values)
    return Spread(statistics.fmean(listed), statistics.stdev(listed) if len(listed) > 1 else None)


# Header of a column -> what it says.
_MEANINGS = {
    "KL": "mean divergence from the dense model, nats per token, lower is better",
    "agreement": "share of tokens with its most likely next token, higher is better",
    "avg": "mean of the tasks' scores in %, higher is better",
    "time": "mean of all stages behind a row, shared ones included",
    "memory": "the most that one rank took",
}


def few_columns_of_methods(comparisons: Sequence[Comparison], reference: str) -> list[Column[Comparison]]:
    """The default columns, which fit a terminal 80 characters wide if names have the usual lengths."""
    differs = len({it.recovery for it in comparisons}) > 1
    has_reference = any(it.method == reference for it in comparisons)
    return [
        Column("model", lambda it: it.model, is_text=True),
        Column("ratio", lambda it: f"{it.ratio:g}" if it.ratio else "dense", is_text=True),
        Column("method", lambda it: it.method, is_text=True),
        *[Column[Comparison]("recovery", lambda it: it.recovery, is_text=True)] * differs,
        Column("KL", lambda it: _shown(it.measures["kl"], 3)),
        *[Column[Comparison](f"KL / {reference}", lambda it: _shown(it.kl_share, 3))] * has_reference,
        Column("agreement", lambda it: _shown(it.measures["top1_agreement"], 3)),
        Column("seeds", lambda it: str(it.sweeps)),
    ]


def all_columns_of_methods(comparisons: Sequence[Comparison], reference: str) -> list[Column[Comparison]]:
    """All columns; the time is that of all stages behind a row, shared ones included."""
    scored = any(it.measures["average"] for it in comparisons)
    return [
        *few_columns_of_methods(comparisons, reference),
        Column("perplexity", lambda it: _shown(it.measures["perplexity"], 1)),
        *[Column[Comparison]("avg", lambda it: _shown(it.measures["average"], 1, 100))] * scored,
        Column("time", lambda it: duration(it.wall_time_s)),
        Column("memory", lambda it: byte_count(it.peak_memory_bytes)),
    ]


def note_on_methods(comparisons: Sequence[Comparison], columns: Sequence[Column[Comparison]]) -> str:
    """A sentence for below the table, on what these columns say."""
    told = [f"{it.header}: {_MEANINGS[it.header]}" for it in columns if it.header in _MEANINGS]
    spreads = (it for row in comparisons for it in (*row.measures.values(), row.kl_share))
    if any(it is not None and it.deviation is not None for it in spreads):
        told.append("±: standard deviation over seeds")
    told += [
        f"{it.header}: {fewer}" for it in columns if it.header.startswith("KL / ") and (fewer := _fewer(comparisons))
    ]
    return "; ".join(told)


def _fewer(comparisons: Sequence[Comparison]) -> str:
    """Name the rows that have no reference in some of their seeds; empty if there are none."""
    some = [it for it in comparisons if 0 < it.sweeps_with_reference < it.sweeps]
    names = (
        f"{it.model} {it.ratio:g} {it.method} {it.recovery} {it.sweeps_with_reference} of {it.sweeps}" for it in some
    )
    return f"over the seeds that have both methods ({', '.join(names)})" if some else ""


def methods_table(comparisons: Sequence[Comparison], reference: str) -> str:
    """Markdown table of methods, with a note below."""
    columns = all_columns_of_methods(comparisons, reference)
    return f"{markdown(comparisons, columns)}\n{escaped(note_on_methods(comparisons, columns))}\n"


def _shown(value: Spread | None, digits: int, times: int = 1) -> str:
    if value is None:
        return "-"
    if value.deviation is None:
        return number(times * value.mean, f".{digits}f")
    return measured(times * value.mean, times * value.deviation, digits)
