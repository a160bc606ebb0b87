"""The state of a sweep as a table, from artifacts, claims, the ledger, heartbeats and squeue; logs of rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hfprune_launch.screen import plain_table, time_left
from hfprune_launch.slurm.causes import log_tail
from hfprune_launch.slurm.commands import JobInfo
from hfprune_launch.sweep_folder import NO_RUN, measured_hours
from rich.markup import escape
from rich.table import Table

from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.planning.plan import Plan
from hfprune_dist.results.formats import duration
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Ledger, local_log
from hfprune_dist.store.stage import Stage

# States of stages that have yet to begin.
NOT_BEGUN = ("missing", "waiting", "queued")
COLORS = {"done": "green", "running": "cyan", "failed": "red", "died": "red"}


@dataclass(frozen=True)
class StageStatus:
    """One line of the table; strings are empty if there is nothing to show.

    Attributes:
        state: done, running, queued, failed, died, waiting, missing or not needed; submitted, if Slurm says nothing of
            its job; or Slurm's state of its job.
        detail: why it waits or failed, or who runs it.
        left: time until the end of its current phase; before it begins, what stages like it took.
    """

    stage: Stage
    state: str
    detail: str
    progress: str
    left: str
    job: str
    nodes: str
    attempts: int


def stage_statuses(plan: Plan, store: Store, jobs: Mapping[str, JobInfo] | None) -> list[StageStatus]:
    """Return one line per stage, in plan order; ``jobs``: by name; None as long as Slurm does not answer."""
    hours_of, ledger = measured_hours(plan, store), Ledger(store)
    needed = set(plan.lacking(lambda stage_id: store.handle(stage_id).is_committed()))
    statuses = []
    for stage in plan.stages.values():
        status = _status(stage, ledger, jobs)
        if status.state in ("missing", "waiting") and stage.id not in needed:
            status = replace(status, state="not needed", detail="")
        elif status.state in NOT_BEGUN:
            hours = hours_of(stage)
            status = replace(status, left=NO_RUN if hours is None else f"~{duration(3600 * hours)}")
        statuses.append(status)
    return statuses


def _status(stage: Stage, ledger: Ledger, jobs: Mapping[str, JobInfo] | None) -> StageStatus:
    handle, attempts = ledger.store.handle(stage.id), ledger.jobs_of(stage.id)
    attempt = attempts[-1] if attempts and attempts[-1].end is None else None
    runs = attempt.runs() if attempt is not None else []
    job = jobs.get(attempt.intent.job_name) if attempt is not None and jobs else None
    state, detail = _state(stage, ledger, job)
    if attempt is not None and job is None and state in ("missing", "waiting", "died"):
        state, detail = "submitted", ""
    elif job is not None and job.is_live and state != "done":
        is_next = job.state == "RUNNING" and attempt is not None and not runs  # of those that its job runs
        state = "queued" if job.is_waiting or is_next else job.state.lower()
        detail = job.reason if job.is_waiting else ""
    elif job is not None and state == "missing" and not detail:
        detail = f"job {job.job_id} ended ({job.state}); run the same command again"
    beat = handle.heartbeat() if state != "done" else None
    if runs and beat is not None and (runs[-1].ended or beat.updated < runs[-1].started):
        beat = None  # an earlier start's
    return StageStatus(
        stage=stage,
        state=state,
        detail=detail,
        progress=str(beat or ""),
        left=time_left(beat) if state == "running" else "",
        job=(attempts[-1].job_id or "") if attempts else "",
        nodes=job.nodes if job is not None else "",
        attempts=len(attempts),
    )


def _state(stage: Stage, ledger: Ledger, job: JobInfo | None) -> tuple[str, str]:
    """Return the state of a stage according to its files, and who runs it, why it failed, or what it waits for."""
    store, handle = ledger.store, ledger.store.handle(stage.id)
    holder = handle.holder()
    if job is not None and holder is not None and holder.job is not None:
        holder = None  # Slurm itself knows the state of its job
    if handle.is_committed():
        return "done", ""
    if holder is not None and holder.lives:
        return "running", str(holder)
    if (failure := ledger.failure(stage.id)) is not None:
        return "failed", f"{failure.cause}: {failure.in_one_line}"
    if holder is not None:
        return "died", f"{holder} ended without giving a reason; run the same command again"
    missing = [need for need in stage.needs if not store.handle(need).is_committed()]
    if missing:
        return "waiting", f"for {missing[0]}"
    end = ledger.last_end(stage.id)
    return "missing", end.in_one_line if end is not None else ""


def status_table(statuses: list[StageStatus]) -> Table:
    """Return the table, with jobs if there are any."""
    has_jobs = any(status.attempts for status in statuses)
    of_jobs = ["job", "nodes", "attempts"] if has_jobs else []
    lines = plain_table("stage", "for", "state", "progress", "left", *of_jobs, "")
    for status in statuses:
        lines.add_row(
            status.stage.kind,
            escape(status.stage.label),
            f"[{COLORS.get(status.state, 'yellow')}]{status.state}[/]",
            escape(status.progress),
            status.left,
            *([status.job, escape(status.nodes), str(status.attempts)] if has_jobs else []),
            escape(status.detail),
        )
    return lines


def row_logs(plan: Plan, store: Store, local_logs: Path, name: str, lines: int) -> str:
    """Return the ends of the newest logs of all stages behind a row (label) or of one stage (id or fingerprint)."""
    ledger, parts = Ledger(store), []
    for stage_id in _stages_of(plan, name):
        stage, attempts = plan.stages[stage_id], reversed(ledger.attempts_at(stage_id))
        tails = (log_tail([*each.logs(), local_log(local_logs, each.intent)], lines) for each in attempts)
        shown = next(filter(None, tails), f"  no log ({' '.join(_state(stage, ledger, None)).strip()})")
        parts.append(f"{stage.kind} {stage.label} ({stage_id})\n{shown}")
    return "\n".join(parts)


def _stages_of(plan: Plan, name: str) -> list[str]:
    for cell in plan.cells:
        if cell.label == name:
            return plan.upstream(cell)
    stages = [stage_id for stage_id in plan.stages if name in (stage_id, stage_id.split("/")[1])]
    if not stages:
        labels = [cell.label for cell in plan.cells]
        raise UserError(f"--logs: no row {name!r}{did_you_mean(name, labels)}; rows: {', '.join(labels)}")
    return stages
