"""The state of a sweep as a table, from artifacts, claims, attempt records, heartbeats and squeue; logs of rows."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hfprune_launch.measured_hours import NO_RUN, measured_hours
from hfprune_launch.screen import plain_table
from hfprune_launch.slurm.attempts import JobAttempt
from hfprune_launch.slurm.exit_causes import log_tail
from hfprune_launch.slurm.job_info import JobInfo
from hfprune_launch.slurm.slurm_stage import SlurmStage
from hfprune_launch.stage.stage_file import began_at
from hfprune_launch.stage.stage_state import staleness, state_of, time_left
from rich.markup import escape
from rich.table import Table

from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.planning.plan import Plan
from hfprune_dist.results.formats import duration
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import listed, modified_at
from hfprune_dist.store.heartbeat import Heartbeat
from hfprune_dist.store.stage import Stage

# States of stages that have yet to begin.
NOT_BEGUN = ("missing", "waiting", "queued")
COLORS = {"done": "green", "running": "cyan", "failed": "red", "died": "red"}


@dataclass(frozen=True)
class StageStatus:
    """One line of the table; strings are empty if there is nothing to show.

    Attributes:
        state: done, running, queued, failed, died, waiting, missing or not needed; submitted, if nobody says what has
            become of its job; or Slurm's state of its job.
        detail: why it waits or failed, who runs it, or for how long it has given no sign of life.
        left: time until the end of its current phase; before it begins, what stages like it took.
        gpu_hours, core_hours: totals of all attempts, None before the first.
    """

    stage: Stage
    state: str
    detail: str
    progress: str
    left: str
    job: str
    nodes: str
    attempts: int
    gpu_hours: float | None
    core_hours: float | None


def stage_statuses(plan: Plan, store: Store, jobs: Mapping[str, JobInfo] | None) -> list[StageStatus]:
    """Return one line per stage, in plan order.

    Args:
        jobs: by id; None if nothing is known of any, as Slurm does not answer.
    """
    now, hours_of = time.time(), measured_hours(plan, store)
    # By name, since the id of a job isn't known if its launcher died before recording it.
    by_name = None if jobs is None else {job.name: job for job in sorted(jobs.values(), key=lambda job: job.is_live)}
    statuses = [_status(stage, SlurmStage(store, stage.id), by_name, now) for stage in plan.stages.values()]
    statuses = [
        replace(status, left=_expected(hours_of(status.stage)) if status.state in NOT_BEGUN else status.left)
        for status in statuses
    ]
    needed = set(plan.lacking(lambda stage_id: store.handle(stage_id).is_committed()))
    return [
        replace(status, state="not needed", detail="", left="")
        if status.state in ("missing", "waiting") and status.stage.id not in needed
        else status
        for status in statuses
    ]


def _expected(hours: float | None) -> str:
    return NO_RUN if hours is None else f"~{duration(3600 * hours)}"


def _status(stage: Stage, handle: SlurmStage, jobs: Mapping[str, JobInfo] | None, now: float) -> StageStatus:
    attempts = handle.attempts()
    last = attempts[-1] if attempts else None
    open_attempt = last if last is not None and last.end is None else None
    job = None if open_attempt is None or jobs is None else jobs.get(open_attempt.intent.job_name)
    state, detail = _state(stage, handle, job)
    if jobs is None and open_attempt is not None and state in ("missing", "waiting", "died"):
        state, detail = "submitted", ""
    last_beat = handle.heartbeat()
    heartbeat = last_beat if state == "running" else None
    started = _started(open_attempt, handle)
    signs = [*started, *([heartbeat.updated] if heartbeat is not None else [])]
    stale = staleness(signs, now) if state == "running" else ""
    held_until = _held_until(state, last_beat, now)
    seconds = [_seconds(attempt, held_until) for attempt in attempts]
    return StageStatus(
        stage=stage,
        state=state,
        detail="; ".join(part for part in (detail, stale) if part),
        progress="" if heartbeat is None else str(heartbeat),
        # A heartbeat from before the start belongs to an earlier one.
        left="" if heartbeat is None or heartbeat.updated < max(started, default=0.0) else time_left(heartbeat),
        job=(last.job_id or "") if last is not None else "",
        nodes=job.nodes if job is not None else "",
        attempts=len(attempts),
        gpu_hours=_hours(seconds, [attempt.intent.gpus for attempt in attempts]),
        core_hours=_hours(seconds, [attempt.intent.cores for attempt in attempts]),
    )


def _state(stage: Stage, handle: SlurmStage, job: JobInfo | None) -> tuple[str, str]:
    claim = handle.open_claim()
    if job is not None and claim is not None and claim.holder.job is not None:
        claim = None  # Slurm itself knows the state of its job
    known = state_of(stage, handle, claim)
    if job is not None and job.is_live and known.state != "done":
        return ("queued", job.reason) if job.is_waiting else (job.state.lower(), "")
    return known.state, known.detail


def _started(open_attempt: JobAttempt | None, handle: SlurmStage) -> list[float]:
    """Return the unix time at which the stage was last started, in a job or on this machine; empty if it wasn't."""
    if open_attempt is not None:
        return [run.started for run in open_attempt.runs()[-1:]]
    began = began_at(handle)
    return [] if began is None else [began]


def _held_until(state: str, heartbeat: Heartbeat | None, now: float) -> float:
    """Return until when a start without a recorded end held its nodes; it was killed if its job waits again."""
    if state not in ("queued", "submitted"):
        return now
    return 0.0 if heartbeat is None else heartbeat.updated


def _seconds(attempt: JobAttempt, held_until: float) -> float:
    end = attempt.end
    return attempt.run_seconds(held_until) if end is None else end.run_seconds


def _hours(seconds: list[float], units: list[int]) -> float | None:
    return sum(time * count for time, count in zip(seconds, units, strict=True)) / 3600 if seconds else None


def status_table(statuses: list[StageStatus]) -> Table:
    """Return the table, with jobs if there are any. Hours are GPU-hours, or core-hours if no job has a GPU."""
    on_gpus = any(status.gpu_hours for status in statuses)
    of_jobs = ["job", "nodes", "attempts", "GPU-h" if on_gpus else "core-h"]
    has_jobs = any(status.attempts for status in statuses)
    headers = ["stage", "for", "state", "progress", "left", *(of_jobs if has_jobs else [])]
    lines = plain_table(*headers, "")
    for status in statuses:
        color = COLORS.get(status.state, "yellow")
        lines.add_row(
            status.stage.kind,
            escape(status.stage.label),
            f"[{color}]{status.state}[/]",
            escape(status.progress),
            status.left,
            *(_of_its_jobs(status, on_gpus) if has_jobs else []),
            escape(status.detail),
        )
    return lines


def _of_its_jobs(status: StageStatus, on_gpus: bool) -> list[str]:
    hours = status.gpu_hours if on_gpus else status.core_hours
    shown = "-" if hours is None else f"{hours:.2f}"
    return [status.job, escape(status.nodes), str(status.attempts), shown]


def row_logs(plan: Plan, store: Store, local_logs: Path, name: str, lines: int) -> str:
    """Return the last lines of the newest log of every stage behind a row of the table.

    Args:
        name: the row's label, as the tables show it, or the id or fingerprint of a stage.

    Raises:
        UserError: for a name of no row or stage.
    """
    stages = _stages_of(plan, name)
    parts = []
    for stage_id in stages:
        stage = plan.stages[stage_id]
        attempt = SlurmStage(store, stage_id).last_attempt()
        local = sorted(listed(local_logs, f"{stage.kind}-{stage.fingerprint}.*.log"), key=_written)
        logs = _newest_logs(attempt, local)
        shown = log_tail(logs, lines) or f"  no log: {_why_no_log(stage, SlurmStage(store, stage_id))}"
        parts.append(f"{stage.kind} {stage.label} ({stage_id})\n{shown}")
    return "\n".join(parts)


def _newest_logs(attempt: JobAttempt | None, local: list[Path]) -> list[Path]:
    """Return the logs of the last job, or the last log on this machine if it was written after the job's submission."""
    if attempt is None or (local and _written(local[-1]) > attempt.recorded_at):
        return local[-1:]
    return attempt.logs()


def _written(log: Path) -> float:
    return modified_at(log) or 0.0


def _why_no_log(stage: Stage, handle: SlurmStage) -> str:
    known = state_of(stage, handle, handle.open_claim())
    if known.state == "done":
        return "its artifact was there already, or its log has been removed"
    if known.state == "running":
        return f"it starts, and has written nothing yet ({known.detail})"
    return f"it has not been started ({known.state}{f' {known.detail}' if known.detail else ''})"


def _stages_of(plan: Plan, name: str) -> list[str]:
    for cell in plan.cells:
        if cell.label == name:
            return plan.upstream(cell)
    stages = [stage_id for stage_id in plan.stages if name in (stage_id, stage_id.split("/")[1])]
    if not stages:
        labels = [cell.label for cell in plan.cells]
        raise UserError(f"--logs: no row {name!r}{did_you_mean(name, labels)}; rows: {', '.join(labels)}")
    return stages
