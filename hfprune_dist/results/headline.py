"""Which of a task's many numbers stands for it in a table, and their averages. Torch-free, no lm-eval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# The first that a task reports is its headline; all are shares between 0 and 1. Perplexities are not, and can't be
# averaged with them: a task that reports nothing else has no headline.
HEADLINE_METRICS = ("acc_norm", "acc", "pct_stereotype", "exact_match", "em", "f1", "pass@1")
# lm-eval's usual filters, of which the strictest counts: metric[filter].
FILTERS = ("", "[strict-match]", "[flexible-extract]")


def headline(metrics: Mapping[str, Any]) -> float | None:
    """The score that stands for a task; None where it has none, or where it is missing.

    Args:
        metrics: metric name -> value, as in the manifest of an evaluation: ``acc``, ``exact_match[strict-match]``, ...
    """
    name = _headline_metric(metrics)
    return None if name is None or metrics[name] is None else float(metrics[name])


def _headline_metric(metrics: Mapping[str, Any]) -> str | None:
    for metric in HEADLINE_METRICS:
        others = sorted(name for name in metrics if name.startswith(f"{metric}[") and name.endswith("]"))
        for name in (*(metric + suffix for suffix in FILTERS), *others):
            if name in metrics:
                return name
    return None


def is_bias_task(task: str) -> bool:
    """Whether a task measures bias: CrowS-Pairs is better where it is lower, so it is reported apart."""
    return task.startswith("crows_pairs")


def averages(tasks: Mapping[str, Mapping[str, Any]]) -> tuple[float | None, float | None]:
    """Mean headline over all tasks, and over those without CrowS-Pairs; None where a task's score is missing.

    A task that reports only other metrics, such as perplexities, is left out: it has no score that could be missing.
    """
    scored = {name: metrics for name, metrics in tasks.items() if not metrics or _headline_metric(metrics)}
    return _mean_headline(scored), _mean_headline({name: scored[name] for name in scored if not is_bias_task(name)})


def _mean_headline(tasks: Mapping[str, Mapping[str, Any]]) -> float | None:
    scores = [score for score in map(headline, tasks.values()) if score is not None]
    return sum(scores) / len(scores) if tasks and len(scores) == len(tasks) else None
