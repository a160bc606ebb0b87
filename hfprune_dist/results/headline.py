"""Headlines of tasks, the one metric of each that tables show, and their average. Needs neither torch nor lm-eval."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

# The first of these that a task reports is its headline; all are shares of right answers. Perplexities are not, and
# can't be averaged with them: a task that reports nothing else has no headline.
HEADLINE_METRICS = ("acc_norm", "acc", "pct_stereotype", "exact_match", "em", "f1", "pass@1")
# lm-eval's usual filters, the strictest first: metric[filter].
FILTERS = ("", "[strict-match]", "[flexible-extract]")
# Reported beside ``f1`` by lm-eval's squadv2, all of whose scores are in percent.
OF_SQUAD_2 = "HasAns_f1"

# A value, and its standard error; None if it isn't known.
Score = tuple[float | None, float | None]


def headline(metrics: Mapping[str, Any]) -> Score:
    """The score that stands for a task, with its standard error.

    Args:
        metrics: metric name -> value, as in the manifest of an evaluation: ``acc``, ``exact_match[strict-match]``, ...
    """
    name = headline_metric(metrics)
    if name is None or metrics[name] is None:
        return None, None
    value, error = float(metrics[name]), metrics.get(f"{name}_stderr")
    scale = 100 if OF_SQUAD_2 in metrics else 1
    return value / scale, None if error is None else error / scale


def headline_metric(metrics: Mapping[str, Any]) -> str | None:
    """Name of the metric that stands for a task; None if it reports no suitable one."""
    for metric in HEADLINE_METRICS:
        others = sorted(name for name in metrics if name.startswith(f"{metric}[") and name.endswith("]"))
        for name in (*(metric + suffix for suffix in FILTERS), *others):
            if name in metrics:
                return name
    return None


def average(tasks: Mapping[str, Mapping[str, Any]]) -> Score:
    """Mean headline over all tasks, and its standard error if they are independent; None if a task's is missing.

    A task that reports only other metrics, such as perplexities, is left out: it has no score that could be missing.
    """
    scores = [headline(metrics) for metrics in tasks.values() if not metrics or headline_metric(metrics)]
    values = [value for value, _ in scores if value is not None]
    errors = [error for _, error in scores if error is not None]
    if not scores or len(values) < len(scores):
        return None, None
    return sum(values) / len(values), math.hypot(*errors) / len(errors) if len(errors) == len(scores) else None
