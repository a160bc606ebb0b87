"""The state of a sweep as a table, from artifacts, records of attempts, heartbeats and squeue; and a cell's logs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from hfprune_launch.slurm.attempts import Attempt
from hfprune_launch.slurm.commands import JobInfo
from hfprune_launch.slurm.exit_causes import log_tail
from hfprune_launch.slurm.slurm_stage import SlurmStage
from rich.markup import escape
from rich.table import Table

from hfprune_dist.errors import UserError, did_you_mean
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Heartbeat
from hfprune_dist.store.stage import Stage

COLORS = {"done": "green", "running": "cyan", "failed": "red"}
# Without a sign of life for so long, a running stage may hang; a step of a large model may take as long.
STALE_MINUTES = 5


@dataclass(frozen=True)
class StageStatus:
    """One line of the table; an empty string where there is nothing to say.

    Attributes:
        state: done, running, queued, failed, waiting, missing or not needed.
        detail: why it waits or failed, or for how long it has given no sign of life.
        gpu_hours, core_hours: over all attempts, None before the first.
    """

    stage: Stage
    state: str
    detail: str
    progress: str
    eta: str
    job: str
    nodes: str
    attempts: int
    gpu_hours: float | None
    core_hours: float | None


def stage_statuses(plan: Plan, store: Store, jobs: Mapping[str, JobInfo]) -> list[StageStatus]:
    """One line per stage, in plan order."""
    now = time.time()
    statuses = [_status(stage, SlurmStage(store, stage.id), jobs, now) for stage in plan.stages.values()]
    needed = set(plan.lacking(lambda stage_id: store.handle(stage_id).is_committed()))
    return [
        replace(status, state="not needed", detail="")
        if status.state in ("missing", "waiting") and status.stage.id not in needed
        else status
        for status in statuses
    ]


def _status(stage: Stage, handle: SlurmStage, jobs: Mapping[str, JobInfo], now: float) -> StageStatus:
    attempts = handle.attempts()
    last = attempts[-1] if attempts else None
    open_attempt = last if last is not None and last.end is None else None
    job = jobs.get(open_attempt.job_id or "") if open_attempt is not None else None
    state, detail = _state(stage, handle, job)
    heartbeat = handle.heartbeat() if state == "running" else None
    seconds = [_seconds(attempt, now) for attempt in attempts]
    return StageStatus(
        stage=stage,
        state=state,
        detail=_stale(open_attempt, heartbeat, now) if open_attempt is not None and state == "running" else detail,
        progress=f"{heartbeat.phase} {heartbeat.done}/{heartbeat.total}" if heartbeat else "",
        eta=_eta(open_attempt, heartbeat) if open_attempt is not None and heartbeat is not None else "",
        job=(last.job_id or "") if last is not None else "",
        nodes=job.nodes if job is not None else "",
        attempts=len(attempts),
        gpu_hours=_hours(seconds, [attempt.intent.gpus for attempt in attempts]),
        core_hours=_hours(seconds, [attempt.intent.cores for attempt in attempts]),
    )


def _state(stage: Stage, handle: SlurmStage, job: JobInfo | None) -> tuple[str, str]:
    if handle.is_committed():
        return "done", ""
    if job is not None and job.is_live:
        return ("queued", job.reason) if job.state == "PENDING" else (job.state.lower(), "")
    failure = handle.failure()
    if failure is not None:
        return "failed", f"{failure.cause}: {failure.message.strip().splitlines()[0]}"
    missing = [need for need in stage.needs if not handle.store.handle(need).is_committed()]
    return ("waiting", f"for {missing[0]}") if missing else ("missing", "")


def _stale(attempt: Attempt, heartbeat: Heartbeat | None, now: float) -> str:
    """For how long the current start of a job has given no sign of life; empty where that is not long."""
    signs = [run.started for run in attempt.runs()] + ([heartbeat.updated] if heartbeat is not None else [])
    minutes = int((now - max(signs, default=now)) / 60)
    return f"stale for {minutes} min" if minutes >= STALE_MINUTES else ""


def _seconds(attempt: Attempt, now: float) -> float:
    end = attempt.end
    return attempt.run_seconds(now) if end is None else end.run_seconds


def _hours(seconds: list[float], units: list[int]) -> float | None:
    return sum(time * count for time, count in zip(seconds, units, strict=True)) / 3600 if seconds else None


def _eta(attempt: Attempt, heartbeat: Heartbeat) -> str:
    """Time left, by the pace of the current start of the job; work that an earlier start did makes it too short."""
    runs = attempt.runs()
    if not runs or heartbeat.done == 0 or heartbeat.updated < runs[-1].started:
        return ""
    left = (heartbeat.updated - runs[-1].started) * (heartbeat.total - heartbeat.done) / heartbeat.done
    return f"{left / 60:.0f} min" if left >= 120 else f"{left:.0f} s"


def status_table(statuses: list[StageStatus]) -> Table:
    """The table; hours are GPU-hours, or core-hours where no job asked for a GPU."""
    on_gpus = any(status.gpu_hours for status in statuses)
    headers = ["stage", "for", "state", "progress", "ETA", "job", "nodes", "attempts", "GPU-h" if on_gpus else "core-h"]
    lines = Table(*headers, "", box=None, pad_edge=False)
    for status in statuses:
        hours = status.gpu_hours if on_gpus else status.core_hours
        color = COLORS.get(status.state, "yellow")
        lines.add_row(
            status.stage.kind,
            escape(status.stage.label),
            f"[{color}]{status.state}[/]",
            escape(status.progress),
            status.eta,
            status.job,
            escape(status.nodes),
            str(status.attempts),
            "-" if hours is None else f"{hours:.2f}",
            escape(status.detail),
        )
    return lines


def cell_logs(plan: Plan, store: Store, local_logs: Path, name: str, lines: int) -> str:
    """The last lines of the newest log of every stage behind a cell.

    Args:
        name: the cell's label, as the tables show it, or the id or fingerprint of a stage.

    Raises:
        UserError: for a name that is no cell's.
    """
    stages = _stages_of(plan, name)
    parts = []
    for stage_id in stages:
        stage = plan.stages[stage_id]
        attempt = SlurmStage(store, stage_id).last_attempt()
        local = sorted(local_logs.glob(f"{stage.kind}-{stage.fingerprint}.*.log"), key=lambda log: log.stat().st_mtime)
        logs = attempt.logs() if attempt is not None else local[-1:]
        parts.append(f"{stage.kind} {stage.label} ({stage_id})\n{log_tail(logs, lines) or '  no log'}")
    return "\n".join(parts)


def _stages_of(plan: Plan, name: str) -> list[str]:
    for cell in plan.cells:
        if cell.label == name:
            return plan.upstream(cell)
    stages = [stage_id for stage_id in plan.stages if name in (stage_id, stage_id.split("/")[1])]
    if not stages:
        labels = [cell.label for cell in plan.cells]
        raise UserError(f"--logs: no cell {name!r}{did_you_mean(name, labels)}; cells: {', '.join(labels)}")
    return stages
