"""Floors: scores of a model that always chooses the same answer, by task, over the documents that were evaluated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from hfprune_dist.results.headline import averages, headline_metric

# Metrics that have a floor: the share of documents whose choice was right.
OF_CHOICES = ("acc_norm", "acc")


def floors_of(tasks: Mapping[str, Mapping[str, Any]], details: Mapping[str, Any]) -> dict[str, float]:
    """Task or group -> the share of its documents for which the best constant answer is right.

    Args:
        tasks: a row's scores; a task whose headline isn't a share of right choices has no floor.
        details: an evaluation's own results, with how often each answer was right; older evaluations lack that.
    """
    known: dict[str, list[int]] = {}
    for task, found in details.get("tasks", {}).items():
        members = found.get("right_answers") or {}
        known |= members
        if members and members.keys() == found.get("n-samples", {}).keys():
            known.setdefault(task, [sum(counts) for counts in zip_longest(*members.values(), fillvalue=0)])
    floors = {task: floor_of(known[task]) for task in tasks if task in known}
    chosen = {task for task, metrics in tasks.items() if headline_metric(metrics) in OF_CHOICES}
    return {task: floor for task, floor in floors.items() if floor is not None and task in chosen}


def floor_of(counts: Sequence[int]) -> float | None:
    """Share of the most frequent right answer; None if all documents have the same one, as when the right choice is
    always listed first: the places of answers mean nothing in such a task.

    Args:
        counts: numbers of documents, by the place of their right answer.
    """
    return None if max(counts, default=0) == sum(counts) else max(counts) / sum(counts)


def average_floors(tasks: Mapping[str, Mapping[str, Any]], floors: Mapping[str, float]) -> tuple[float | None, ...]:
    """The floors of a row's averages; None if one of the averaged tasks has no floor."""
    metrics = {task: {"acc": floors.get(task)} if headline_metric(scores) else scores for task, scores in tasks.items()}
    return averages(metrics)
