"""Methods compared over sweeps that differ in their seed: means and spreads."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence

from hfprune_dist.planning.plan import NONE, OWN
from hfprune_dist.results.markdown import Column
from hfprune_dist.results.metrics import METRICS, Metric
from hfprune_dist.results.rows import DONE, Row
from hfprune_dist.results.table import names

FEW = (METRICS["kl"], METRICS["top1_agreement"])
QUALITY = (*FEW, METRICS["perplexity"], METRICS["average"])
SHARE = "kl_share"


def compare_methods(sweeps: Sequence[Sequence[Row]], reference: str) -> list[Row]:
    """One row for the finished rows of several sweeps with the same model, ratio, method and recovery.

    A row has the mean of each metric of ``QUALITY``, and under ``<key>_stderr`` its standard deviation, which is None
    for a single sweep; both are None if it isn't a number in some sweep. ``kl_share`` is KL divided by the reference
    method's KL after the same recovery in the same sweep, which must not be 0; where pruning and recovery are one
    training, after the first recovery. ``wall_time_s`` is a mean over rows for which it is known, ``peak_memory_bytes``
    the highest peak.
    """
    groups: dict[tuple[str, float, str, str], list[tuple[Row, Row | None]]] = {}
    for rows in sweeps:
        done = [row for row in rows if row["status"] == DONE]
        of_reference = [row for row in done if row["method"] == reference]
        references = {_place(row, OWN): row for row in reversed(of_reference) if row["recovery"] != NONE}
        references |= {_place(row): row for row in of_reference}
        for row in done:
            key = (row["model"], row["ratio"], row["method"] or "dense", row["recovery"])
            groups.setdefault(key, []).append((row, references.get(_place(row))))
    models = list(dict.fromkeys(model for model, *_ in groups))
    in_order = sorted(groups, key=lambda key: (models.index(key[0]), key[1]))
    fields = ("model", "ratio", "method", "recovery")
    return [{**dict(zip(fields, key, strict=True)), **_compared(groups[key])} for key in in_order]


def _place(row: Row, recovery: str = "") -> tuple[str, float, str, str]:
    """Key shared by rows of a sweep that can be compared; rows of its earlier runs may be measured in another way."""
    return row["model"], row["ratio"], recovery or row["recovery"], row["measured_as"]


def _compared(members: Sequence[tuple[Row, Row | None]]) -> Row:
    rows = [row for row, _ in members]
    pairs = [(row["kl"], reference["kl"] if reference else None) for row, reference in members]
    shares = [kl / other if kl is not None and other else None for kl, other in pairs]
    times = [row["wall_time_s"] for row in rows if row["wall_time_s"] is not None]
    measured = {metric.key: _spread(row.get(metric.key) for row in rows) for metric in QUALITY} | {
        SHARE: _spread(shares)
    }
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


def methods_table(rows: Sequence[Row], reference: str, wide: bool) -> tuple[list[Column[Row]], str]:
    """The columns of a table of methods, all of them or a few, and what is to be said below it."""
    share = Metric(SHARE, f"KL / {reference}", "", METRICS["kl"].form)
    shown = [METRICS["kl"], *([share] if any(row["method"] == reference for row in rows) else []), *FEW[1:]]
    if wide:
        costs = (METRICS["wall_time_s"], METRICS["peak_memory_bytes"])
        shown += [*(metric for metric in QUALITY[2:] if metric.is_known(rows)), *costs]
    told = [f"{metric.header}: {metric.told}" for metric in shown if metric.meaning]
    told += ["±: standard deviation over seeds"] if any(row["sweeps"] > 1 for row in rows) else []
    measured = [Column[Row](metric.header, metric.shown) for metric in shown]
    return [*names(rows), *measured, Column("seeds", lambda row: str(row["sweeps"]))], "; ".join(told)
