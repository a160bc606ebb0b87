"""Past attempts on a cluster, summarized from their records for a report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

from hfprune_launch.slurm.attempt_records import End, Run
from hfprune_launch.slurm.attempts import JobAttempt
from hfprune_launch.slurm.causes import Cause
from hfprune_launch.slurm.slurm_stage import SlurmStage

from hfprune_dist.store.attempt import Attempt


def past_attempts(handle: SlurmStage) -> list[Attempt]:
    """Return the jobs of a stage, first to last; a requeued job appears once for each of its starts."""
    return [it for attempt in handle.attempts() for it in _starts(attempt)]


def _starts(attempt: JobAttempt) -> Iterator[Attempt]:
    end, runs, logs = attempt.end, attempt.runs(), tuple(attempt.logs())
    number, ranks = attempt.intent.number, attempt.intent.ranks
    for run in runs[:-1]:
        how, where = run.how or "died", _where(run)
        yield Attempt(number, "failed", run.started, run.ended, how, "requeued", where, logs, ranks)
    last, ended = runs[-1] if runs else None, _ended(runs, end)
    started, where = (last.started, _where(last)) if last is not None else (None, f"job {attempt.job_id or 'unknown'}")
    cause, message = (end.cause, end.message) if end is not None else ("no end known", "")
    yield Attempt(number, _state(end), started, ended, cause, message, where, logs, ranks)


def _ended(runs: Sequence[Run], end: End | None) -> float | None:
    """Return when the last start ended, by its own record or else by that of the attempt's end."""
    if runs and runs[-1].ended is not None:
        return runs[-1].ended
    return None if end is None else max([end.at, *(run.started for run in runs[-1:])])


def _state(end: End | None) -> Literal["done", "failed", "open"]:
    if end is None:
        return "open"
    return "done" if end.cause == Cause.DONE else "failed"


def _where(run: Run) -> str:
    return f"job {run.job_id} on {run.nodes}"
