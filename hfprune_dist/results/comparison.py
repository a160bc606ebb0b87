"""Methods compared over sweeps that differ in their seed: means and spreads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from hfprune_dist.planning.plan import NONE
from hfprune_dist.results.markdown import Column, escaped, markdown
from hfprune_dist.results.metrics import METRICS, Metric
from hfprune_dist.results.rows import Row

FEW = (METRICS["kl"], METRICS["top1_agreement"])
QUALITY = (*FEW, METRICS["perplexity"], METRICS["average"])
SHARE = "kl_share"


def compare_methods(sweeps: Sequence[Sequence[Row]], reference: str) -> list[Row]:
    """One row for the finished rows of several sweeps with the same model, ratio, method and recovery.

    Models come in order of first appearance, each with its ratios from low to high, and their methods in order of first
    appearance. A row has the mean of each metric of ``QUALITY``, and under ``<key>_stderr`` its standard deviation over
    sweeps: None for a single sweep, and both None if it isn't a number in some sweep. ``kl_share`` is KL divided by the
    reference method's KL in the same sweep, which must not be 0. Where pruning and recovery are one training, the
    reference is the recovered one. ``wall_time_s`` is a mean over rows for which it is known, and ``peak_memory_bytes``
    the highest peak.
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
    names = ("model", "ratio", "method", "recovery")
    return [{**dict(zip(names, key, strict=True)), **_compared(groups[key])} for key in in_order]


def _place(row: Row) -> tuple[str, float, bool, str]:
    """Key shared by rows of a sweep that can be compared; rows of its earlier runs may be measured in another way."""
    return row["model"], row["ratio"], row["recovery"] != NONE, row["measured_as"]


def _compared(members: Sequence[tuple[Row, Row | None]]) -> Row:
    rows = [row for row, _ in members]
    pairs = [(row["kl"], reference["kl"] if reference else None) for row, reference in members]
    shares = [kl / other if kl is not None and other else None for kl, other in pairs]
    times = [row["wall_time_s"] for row in rows if row["wall_time_s"] is not None]
    measured = {metric.key: _spread(metric.value(row) for row in rows) for metric in QUALITY} | {SHARE: _spread(shares)}
    return {
        **{key: mean for key, (mean, _) in measured.items()},
        **{f"{key}_stderr": deviation for key, (_, deviation) in measured.items()},
        "sweeps": len(rows),
        "wall_time_s": statistics.fmean(times) if times else None,
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"]), default=None),
    }


def _spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None if there are no values, or one of them isn't a number."""
    known = [math.nan if value is None else value for value in values]
    if not all(map(math.isfinite, known)):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def _metrics(rows: Sequence[Row], reference: str, wide: bool) -> list[Metric]:
    share = Metric(SHARE, f"KL / {reference}", "", METRICS["kl"].form)
    costs = [METRICS["wall_time_s"], METRICS["peak_memory_bytes"]]
    shown = [METRICS["kl"], *([share] if any(row["method"] == reference for row in rows) else []), *FEW[1:]]
    return [*shown, *(metric for metric in QUALITY[2:] if metric.is_known(rows)), *costs] if wide else shown


def columns_of_methods(rows: Sequence[Row], reference: str, wide: bool) -> list[Column[Row]]:
    """The columns of a table of methods.

    Args:
        wide: all of them; otherwise a few, which fit a terminal 80 characters wide if names have the usual lengths.
    """
    recovery: list[Column[Row]] = [Column("recovery", lambda row: row["recovery"], is_text=True)]
    return [
        Column("model", lambda row: row["model"], is_text=True),
        Column("ratio", lambda row: f"{row['ratio']:g}" if row["ratio"] else "dense", is_text=True),
        Column("method", lambda row: row["method"], is_text=True),
        *(recovery if len({row["recovery"] for row in rows}) > 1 else []),
        *(Column[Row](metric.header, metric.shown) for metric in _metrics(rows, reference, wide)),
        Column("seeds", lambda row: str(row["sweeps"])),
    ]


def note_on_methods(rows: Sequence[Row], reference: str, wide: bool) -> str:
    """A sentence for below the table, on what these columns say."""
    told = [f"{metric.header}: {metric.told}" for metric in _metrics(rows, reference, wide) if metric.meaning]
    if any(row["sweeps"] > 1 for row in rows):
        told.append("±: standard deviation over seeds")
    return "; ".join(told)


def methods_table(rows: Sequence[Row], reference: str) -> str:
    """Markdown table of methods, with a note below."""
    table = markdown(rows, columns_of_methods(rows, reference, wide=True))
    return f"{table}\n{escaped(note_on_methods(rows, reference, wide=True))}\n"
