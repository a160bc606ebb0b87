"""Notes below a table: what its columns mean, which direction is better, numbers of examples, and shared costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from hfprune_dist.config.texts import OTHER_TEXTS
from hfprune_dist.planning.plan import OWN
from hfprune_dist.results.costs import OWN_STAGES, SHARED_STAGES
from hfprune_dist.results.efficiency import workload
from hfprune_dist.results.formats import counted, duration, flop_count, hours
from hfprune_dist.results.headline import headline_metric, is_bias_task
from hfprune_dist.results.rows import Row

MEASURED_OTHERWISE = "not to be compared with the first rows of their models, since measured in another way"
# Type of device -> name of the hours on it.
DEVICE_HOURS = {"cuda": "GPU-hours", "cpu": "CPU rank-hours"}


def notes(rows: Sequence[Row]) -> list[str]:
    """Notes on the table of ``few_columns``, one paragraph for each thing that it doesn't explain itself."""
    if not rows:
        return []
    quality = [*_fidelity(rows), *_average(rows)]
    return [*_recovery(rows), *quality, *_speed(rows), *_costs(rows), *_training(rows)]


def wide_notes(rows: Sequence[Row]) -> list[str]:
    """Notes on the additional columns of ``all_columns``."""
    told = [
        "reached: removed / all parameters",
        "width: what is left of intermediate_size",
        "agree: share of held-out tokens with the dense model's most likely next token, higher is better",
        "ppl, and tasks without a share of right answers: perplexity, lower is better",
        *_efficiency(rows),
        "shared: time of the stages that a row shares with others; memory: the most that one rank took",
        "tokens, FLOPs: of distillation and recovery, FLOPs computed from shapes; device-h: also of importance and "
        "pruning, time x ranks of all attempts, own stages and shared ones; wasted-h: of attempts that failed",
        "% of dense: of the dense row that was measured alike",
    ]
    return told if rows else []


def causes(rows: Sequence[Row]) -> list[str]:
    """Lines on each row without a result, on rows that can't be compared with others, and on missing speeds."""
    unmeasured: dict[str, list[str]] = {}
    for row in rows:
        if row["speed_cause"] is not None:
            unmeasured.setdefault(row["speed_cause"], []).append(row["label"])
    return [
        *missing(rows),
        *measured_otherwise(rows),
        *(f"speed missing: {', '.join(labels)}: {cause}" for cause, labels in unmeasured.items()),
    ]


def missing(rows: Sequence[Row]) -> list[str]:
    """A line on each row without a result."""
    return [f"missing: {row['label']}: {row['cause']}" for row in rows if row["status"] == "missing"]


def measured_otherwise(rows: Sequence[Row]) -> list[str]:
    """A line on the rows that ``otherwise_measured`` finds."""
    others = otherwise_measured(rows)
    return [f"{MEASURED_OTHERWISE}: {', '.join(others)}"] if others else []


def otherwise_measured(rows: Sequence[Row]) -> list[str]:
    """Labels of rows whose scores can't be compared with their model's first row's: other weights, text or tasks."""
    first: dict[str, str] = {}
    return [row["label"] for row in rows if first.setdefault(row["model"], row["measured_as"]) != row["measured_as"]]


def _recovery(rows: Sequence[Row]) -> list[str]:
    if all(row["recovery"] != OWN for row in rows):
        return []
    return ["recovery own: units went while LoRA trained, on the rows and in the steps of the others' recovery"]


def _fidelity(rows: Sequence[Row]) -> list[str]:
    windows, tokens = _range(row["windows"] for row in rows), _range(row["tokens"] for row in rows)
    if not tokens:
        return []
    where = ", ".join(counted(number, noun) for number, noun in ((windows, "window"), (tokens, "token")) if number)
    error = "; ±: standard error over windows" if any(row["kl_stderr"] is not None for row in rows) else ""
    others = dict.fromkeys(text for row in rows for text in row[OTHER_TEXTS])
    first = f", the sweep's first (others: {', '.join(others)})" if others else ""
    return [
        f"KL: mean divergence of the next token's distribution from the dense model's, nats, lower is better; held-out "
        f"text{first} (n = {where}){error}"
    ]


def _average(rows: Sequence[Row]) -> list[str]:
    if all(row["average"] is None for row in rows):
        return []
    metrics = {task: headline_metric(scores) for row in rows for task, scores in row["tasks"].items()}
    samples = {task: _range(row["samples"].get(task) for row in rows) for task in metrics}
    tasks = [
        f"{task} {metric}" + (f" (n = {samples[task]})" if samples[task] else "")
        for task, metric in metrics.items()
        if metric is not None
    ]
    bias = ", but for crows_pairs lower is" if any(map(is_bias_task, metrics)) else ""
    return [f"avg: mean of the tasks' scores in %, higher is better{bias}; ±: standard error; {', '.join(tasks)}"]


def _speed(rows: Sequence[Row]) -> list[str]:
    """How speed was measured; each kind of measurement once, if rows have several."""
    found = [row["efficiency"] for row in rows if row["efficiency"] is not None]
    how = dict.fromkeys(f"{workload(it['runs'][-1])}; {_device(it)}" for it in found)
    told = "speed: tokens per second after the first, as a multiple of the dense model's in turn, higher is better"
    return [f"{told} ({' / '.join(how)})"] if how else []


def _device(efficiency: Mapping[str, Any]) -> str:
    if "threads" not in efficiency:
        return f"{efficiency['device']}"
    threads = efficiency["threads"]
    cores = efficiency.get("cores", threads)  # earlier versions didn't record it
    return f"{efficiency['device']}, threads: {threads}" + (f" on {counted(cores, 'core')}" if cores < threads else "")


def _efficiency(rows: Sequence[Row]) -> list[str]:
    if not _speed(rows):
        return []
    return [
        "speeds: the least and the most of a measurement's pairs; tokens/s: of all sequences together; first token: "
        "from the prompts; generating: most memory at once, of weights and whatever torch allocates; FLOPs and bytes "
        "of cache per token: computed from shapes"
    ]


def _training(rows: Sequence[Row]) -> list[str]:
    """The cost of training: its range over rows, for their own stages and for those that they share."""
    devices = {row["training_device"] for row in rows} - {None}
    hours_of = DEVICE_HOURS.get(next(iter(devices)), "device-hours") if len(devices) == 1 else "device-hours"
    told = []
    for whose, what in ((OWN_STAGES, "of a row's own stages"), (SHARED_STAGES, "of those that it shares")):
        flops = _spread([row[f"{whose}_training_flops"] for row in rows], flop_count)
        times = _spread([row[f"{whose}_training_device_hours"] for row in rows], hours)
        found = [f"{amount} {unit}" for amount, unit in ((flops, "FLOPs"), (times, hours_of)) if amount]
        told += [f"{what} {', '.join(found)}"] if found else []
    return [f"training cost, without evaluation: {'; '.join(told)}"] if told else []


def _spread(values: Iterable[float | None], form: Callable[[float | None], str]) -> str:
    """The lowest and highest of the nonzero values; empty if there is none."""
    known = [value for value in values if value]
    ends = dict.fromkeys(map(form, (min(known), max(known)))) if known else ()
    return " to ".join(ends)


def _costs(rows: Sequence[Row]) -> list[str]:
    told = "kept%: parameters in % of the dense model's; size: of the weights on disk; time: of a row's own stages"
    shared = [f"{model} {duration(seconds)}" for model, seconds in _shared_times(rows).items()]
    return [f"{told}; those that rows share took: {', '.join(shared)}" if shared else told]


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
