"""Headlines of tasks, the one metric of each that tables show, and their averages. Needs neither torch nor lm-eval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# The first of these that a task reports is its headline; all are shares between 0 and 1. Perplexities are not, and
# can't be averaged with them: a task that reports nothing else has no headline.
HEADLINE_METRICS = ("acc_norm", "acc", "pct_stereotype", "exact_match", "em", "f1", "pass@1")
# lm-eval's usual filters, the strictest first: metric[filter].
FILTERS = ("", "[strict-match]", "[flexible-extract]")
# Reported beside ``f1`` by lm-eval's squadv2, all of whose scores are in percent.
OF_SQUAD_2 = "HasAns_f1"

Tasks = Mapping[str, Mapping[str, Any]]


def headline(metrics: Mapping[str, Any]) -> float | None:
    """The score that stands for a task; None if it has none, or if it is missing.

    Args:
        metrics: metric name -> value, as in the manifest of an evaluation: ``acc``, ``exact_match[strict-match]``, ...
    """
    return _number(metrics, headline_metric(metrics))


def headline_error(metrics: Mapping[str, Any]) -> float | None:
    """The standard error of a task's headline; None if it has none."""
    name = headline_metric(metrics)
    return _number(metrics, None if name is None else f"{name}_stderr")


def _number(metrics: Mapping[str, Any], name: str | None) -> float | None:
    value = None if name is None else metrics.get(name)
    if value is None:
        return None
    return float(value) / 100 if OF_SQUAD_2 in metrics else float(value)


def headline_metric(metrics: Mapping[str, Any]) -> str | None:
    """Name of the metric that stands for a task; None if it reports no suitable one."""
    for metric in HEADLINE_METRICS:
        others = sorted(name for name in metrics if name.startswith(f"{metric}[") and name.endswith("]"))
        for name in (*(metric + suffix for suffix in FILTERS), *others):
            if name in metrics:
                return name
    return None


def is_bias_task(task: str) -> bool:
    """Whether a task measures bias: for CrowS-Pairs, lower is better, so averages are also reported without it."""
    return task.startswith("crows_pairs")


def averages(tasks: Tasks) -> tuple[float | None, float | None]:
    """Mean headline over all tasks, and over all but CrowS-Pairs; None if a task's score is missing.

    A task that reports only other metrics, such as perplexities, is left out: it has no score that could be missing.
    """
    return _mean_headline(_scored(tasks)), _mean_headline(_scored(tasks, bias=False))


def average_errors(tasks: Tasks) -> tuple[float | None, float | None]:
    """Standard errors of ``averages``, treating tasks as independent; None if a task's score has none."""
    return _error_of_mean(_scored(tasks)), _error_of_mean(_scored(tasks, bias=False))


def _scored(tasks: Tasks, *, bias: bool = True) -> Tasks:
    scored = {name: metrics for name, metrics in tasks.items() if not metrics or headline_metric(metrics)}
    return {name: metrics for name, metrics in scored.items() if bias or not is_bias_task(name)}


def _mean_headline(tasks: Tasks) -> float | None:
    scores = [score for score in map(headline, tasks.values()) if score is not None]
    return sum(scores) / len(scores) if tasks and len(scores) == len(tasks) else None


def _error_of_mean(tasks: Tasks) -> float | None:
    errors = [error for error in map(headline_error, tasks.values()) if error is not None]
    return math.hypot(*errors) / len(errors) if tasks and len(errors) == len(tasks) else None
