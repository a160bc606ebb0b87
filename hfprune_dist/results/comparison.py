"""Methods compared over sweeps that differ in their seed: means and spreads; whether they differ in nothing else."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hfprune_dist.config.section import as_written
from hfprune_dist.planning.plan import NONE, Cell, Plan
from hfprune_dist.results.markdown import Column, escaped, markdown
from hfprune_dist.results.metrics import METRICS, Metric
from hfprune_dist.results.rows import Row, all_or_none
from hfprune_dist.store.stage import Stage

FEW = (METRICS["kl"], METRICS["top1_agreement"])
QUALITY = (*FEW, METRICS["perplexity"], METRICS["average"])
SHARE = "kl_share"
TIME = Metric(
    "wall_time_s", "time", "mean of all stages behind a row, shared ones included", METRICS["own_time_s"].form
)


def compare_methods(sweeps: Sequence[Sequence[Row]], reference: str) -> list[Row]:
    """One row for the finished rows of several sweeps with the same model, ratio, method and recovery.

    Models come in order of first appearance, each with its ratios from low to high, and their methods in order of first
    appearance. A row has the mean of each metric of ``QUALITY``, and under ``<key>_stderr`` its standard deviation over
    sweeps: None for a single sweep, and both None if it isn't a number in some sweep. ``kl_share`` is KL divided by the
    reference method's KL in the same sweep, over the ``sweeps_with_reference`` of all ``sweeps`` that have one; None
    without any, and if one of the two isn't a number, or the reference's is 0. Where pruning and recovery are one
    training, the reference is the recovered one. ``wall_time_s`` is a mean over rows for which it is known, and
    ``peak_memory_bytes`` the highest peak.
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
    references = [(row["kl"], reference["kl"]) for row, reference in members if reference is not None]
    shares = [kl / other if kl is not None and other else None for kl, other in references]
    times = [row["wall_time_s"] for row in rows if row["wall_time_s"] is not None]
    measured = {metric.key: _spread(metric.value(row) for row in rows) for metric in QUALITY} | {SHARE: _spread(shares)}
    return {
        **{key: mean for key, (mean, _) in measured.items()},
        **{f"{key}_stderr": deviation for key, (_, deviation) in measured.items()},
        "sweeps": len(rows),
        "sweeps_with_reference": len(shares),
        "wall_time_s": statistics.fmean(times) if times else None,
        "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows if row["peak_memory_bytes"]), default=None),
    }


def _spread(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Mean and sample standard deviation; None if there are no values, or one of them isn't a number."""
    known = all_or_none(values)
    if not known or not all(map(math.isfinite, known)):
        return None, None
    return statistics.fmean(known), statistics.stdev(known) if len(known) > 1 else None


def _metrics(rows: Sequence[Row], reference: str, wide: bool) -> list[Metric]:
    share = Metric(SHARE, f"KL / {reference}", "", METRICS["kl"].form)
    costs = [TIME, METRICS["peak_memory_bytes"]]
    shown = [METRICS["kl"], *([share] if any(row["method"] == reference for row in rows) else []), *FEW[1:]]
    return [*shown, *(it for it in QUALITY[2:] if it.is_known(rows)), *costs] if wide else shown


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
    if some := [row for row in rows if 0 < row["sweeps_with_reference"] < row["sweeps"]]:
        names = [
            f"{it['model']} {it['ratio']:g} {it['method']} {it['recovery']} {it['sweeps_with_reference']} of "
            f"{it['sweeps']}"
            for it in some
        ]
        told.append(f"KL / {reference}: over the seeds that have both methods ({', '.join(names)})")
    return "; ".join(told)


def methods_table(rows: Sequence[Row], reference: str) -> str:
    """Markdown table of methods, with a note below."""
    table = markdown(rows, columns_of_methods(rows, reference, wide=True))
    return f"{table}\n{escaped(note_on_methods(rows, reference, wide=True))}\n"


SEED = "seed"
# What a pass computes besides the scores that a row's method reads is of other rows; which it reads, the method says.
_OF_OTHER_ROWS = {"criteria", "structures"}
# Chosen to suit the GPUs, and without effect on a result beyond rounding.
_OF_THE_MACHINE = {"recovery.micro_batch_size", "distillation.micro_batch_size"}

# (stage, name of a setting or of a user's file) -> what is equal if it makes no difference, and what people see of it.
MadeWith = Mapping[tuple[str, str], tuple[object, str]]


def made_with(plan: Plan, cell: Cell) -> MadeWith:
    """Everything that a row's checkpoint and its evaluation depend on, in the order in which stages run.

    Its speed is measured where a sweep happens to run, and isn't part of it.
    """
    evaluate, stages = plan.stages[cell.evaluate], list[tuple[str, Stage]]()
    for stage in (plan.stages[stage_id] for stage_id in cell.producers):
        number = sum(other.kind == stage.kind for _, other in stages)
        stages.append((stage.kind if not number else f"{stage.kind} {number + 1}", stage))
    references = {role: it.location for role, it in evaluate.inputs.items() if it.is_stage and role != "model"}
    stages += [(f"held-out {role}", plan.stages[stage_id]) for role, stage_id in references.items()]
    made: dict[tuple[str, str], tuple[object, str]] = {}
    for name, stage in (*stages, (evaluate.kind, evaluate)):
        record = stage.to_json()
        for role, source in stage.inputs.items():
            if not source.is_stage:  # stages that a row rests on are in it themselves, without their seeds
                shown = f"{source.location} (content {source.identity[:8]})"
                made[name, f"input {role!r}"] = (source.identity, shown)
        ignored = {*_OF_THE_MACHINE, *_of_other_rows(record)}
        settings = {key: value for key, value in _flat(record["params"]) if key not in ignored}
        made |= {(name, key): (value, as_written(value)) for key, value in settings.items()}
    return made


def difference(one: MadeWith, other: MadeWith) -> tuple[str, str, str, str] | None:
    """The first thing but a seed in which two rows differ: its stage, its name, and what it is in one row and in the
    other; None if there is nothing.
    """
    unset = (None, "not set")
    for key in [*one, *(it for it in other if it not in one)]:
        if key[1] != SEED and ((key in one) != (key in other) or one[key][0] != other[key][0]):
            return *key, one.get(key, unset)[1], other.get(key, unset)[1]
    return None


def have_one_seed(one: MadeWith, other: MadeWith) -> bool:
    """Whether the stages behind two rows have the same seeds, if any has one."""
    seeds, others = ({key: made[key] for key in made if key[1] == SEED} for made in (one, other))
    return bool(seeds) and seeds == others


def _of_other_rows(record: Mapping[str, Any]) -> set[str]:
    kind, params = record["kind"], record["params"]
    if kind == "reference" and params["text"] is None:
        return {"micro_batch_size"}  # on calibration windows; that of distillation
    return _OF_OTHER_ROWS if kind == "importance" else set()


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Each setting under its name, with those of its section in front."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
