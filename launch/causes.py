"""Why an attempt ended without an artifact, told from what the ranks left, what Slurm says and what the log shows."""

from __future__ import annotations

import re
import time
from dataclasses import asdict
from pathlib import Path

from hfprune_dist.artifacts import Store
from hfprune_dist.plan import Stage
from hfprune_dist.progress import Failure, read_failures, read_heartbeat
from launch.ledger import NEED_ENDED, QUEUE_FULL, Attempt, End, as_progress, fruitless_starts
from launch.slurm_cli import JobInfo

NO_PROGRESS = "time limit without progress"
WHAT_TO_RAISE = "raise time_minutes or signal_seconds in the profile, or lower runtime.save_every_steps"
# So many starts of a job in a row may be interrupted before they get any further.
FRUITLESS_STARTS = 3
# Cause -> how often a launcher tries again by itself. A new run of the command always tries again.
RETRIES = {
    "preempted": 1000,
    "node failure": 10,
    "bad node": 3,
    "time limit": 1000,  # only where the job got further; each time it does, so it comes to an end
    "interrupted": 20,
    "killed": 2,
    "lost input": 2,
    "lost job": 3,
    "dependency": 1000,  # ends with the retries of what it depends on
    "duplicate": 20,
    QUEUE_FULL: 1_000_000,
    NEED_ENDED: 1_000_000,
    NO_PROGRESS: 0,
    "out of memory": 0,
    "cancelled": 0,
    "refused": 0,
    "input": 0,
    "code": 0,
}
LOG_TAIL_LINES = 12
LOG_TAIL_BYTES = 64 * 1024
STATE_CAUSES = {
    "NODE_FAIL": "node failure",
    "BOOT_FAIL": "node failure",
    "LAUNCH_FAILED": "bad node",
    "PREEMPTED": "preempted",
    "OUT_OF_MEMORY": "out of memory",
}
# What Slurm writes into a job's log, for where neither squeue nor sacct remember the job.
LOG_STATES = {
    "DUE TO NODE FAILURE": "NODE_FAIL",
    "DUE TO PREEMPTION": "PREEMPTED",
    "DUE TO TIME LIMIT": "TIMEOUT",
    "DUE TO JOB REQUEUE": "REQUEUED",
    "CANCELLED AT": "CANCELLED",
}
OUT_OF_MEMORY = re.compile(
    r"OutOfMemoryError|CUDA out of memory|can't allocate memory|MemoryError|oom[-_ ]kill|out of memory", re.IGNORECASE
)
BAD_NODE = re.compile(r"srun: error: Node failure on (\S+)|srun: error: (\S+?): tasks?[ :].*(?:Killed|Bus error)")


def explain_end(store: Store, stage: Stage, attempt: Attempt, job: JobInfo | None) -> End:
    """How an attempt whose job is over ended; success is a verified artifact and nothing else."""
    now = time.time()
    tail = log_tail(attempt.logs())
    state = job.state if job is not None else _state_from(tail)
    cause, message = _cause(store, stage, attempt, state, tail)
    seconds = attempt.run_seconds(_end_of(store, stage, job, now))
    heartbeat = read_heartbeat(store.work(stage.id))
    return End(
        cause=cause,
        message=message,
        at=now,
        state=state,
        nodes=job.nodes if job is not None else "",
        bad_nodes=_bad_nodes(cause, tail, attempt),
        log_tail=tail if cause != "done" else "",
        run_seconds=seconds,
        gpu_seconds=seconds * attempt.intent.gpus,
        progress=None if heartbeat is None else asdict(heartbeat),
    )


def _cause(store: Store, stage: Stage, attempt: Attempt, state: str, tail: str) -> tuple[str, str]:
    if store.verify(stage.id).state == "done":
        return "done", ""
    job = f"job {attempt.job_id}"
    failure = _failure_of(store, stage, attempt)
    if state == "CANCELLED":
        missing = [need for need in stage.needs if store.verify(need).state != "done"]
        if missing and not attempt.runs():
            return "dependency", f"{job} was dropped with the job of {missing[0]}, on which it depends"
        return "cancelled", f"{job} was cancelled; run the same command again to go on"
    if failure is not None and failure.cause not in ("code", "killed"):
        return failure.cause, failure.message
    said = f"{failure.message if failure else ''}\n{tail}"
    if state == "OUT_OF_MEMORY" or OUT_OF_MEMORY.search(said):
        return "out of memory", f"{job} ran out of memory; give the stage more nodes or memory in the profile:\n{said}"
    if state in STATE_CAUSES:
        return STATE_CAUSES[state], f"{job} ended by Slurm: {state}"
    if state in ("TIMEOUT", "DEADLINE"):
        return _time_limit(store, stage, attempt, job)
    if failure is not None and failure.cause == "code" and not failure.is_consequence:
        return "code", failure.message
    what = f"{job} ({state or 'state unknown'}): a rank died without a message"
    return "killed", f"{what}; its log ends with:\n{tail}"


def _failure_of(store: Store, stage: Stage, attempt: Attempt) -> Failure | None:
    """What the attempt's own ranks have left. A job whose last start came too late for the stage has left nothing."""
    runs = attempt.runs()
    if runs and runs[-1].how == "duplicate":
        message = f"job {attempt.job_id} left the stage to another process that has claimed it"
        return Failure("duplicate", message, -1, time.time(), attempt.intent.number)
    failures = read_failures(store.work(stage.id))
    return next((it for it in failures if it.is_of(attempt.intent.number, attempt.intent.created)), None)


def _time_limit(store: Store, stage: Stage, attempt: Attempt, job: str) -> tuple[str, str]:
    """The job did not reach a point where it could save its work and requeue itself; did it get anywhere?"""
    progress = [*attempt.earlier_progress(), as_progress(read_heartbeat(store.work(stage.id)))]
    if fruitless_starts(progress) == 0:
        return "time limit", f"{job} reached its time limit of {attempt.intent.time_minutes} minutes, and got further"
    return NO_PROGRESS, (
        f"{job} reached its time limit of {attempt.intent.time_minutes} minutes without getting further than before; "
        + WHAT_TO_RAISE
    )


def never_gets_further(attempt: Attempt) -> Failure | None:
    """Why a job that was interrupted must not go on, where its last starts got nowhere; None where it may."""
    starts = fruitless_starts(attempt.earlier_progress())
    if starts < FRUITLESS_STARTS:
        return None
    message = (
        f"job {attempt.job_id} was interrupted, and its last {starts} starts of {attempt.intent.time_minutes} minutes "
        f"each got no further than those before; {WHAT_TO_RAISE}"
    )
    return Failure(NO_PROGRESS, message, 0, time.time(), attempt.intent.number)


def _end_of(store: Store, stage: Stage, job: JobInfo | None, now: float) -> float:
    """When a job ended that could not say so itself: by Slurm's word, else by its last heartbeat."""
    if job is not None:
        try:
            return time.mktime(time.strptime(job.end, "%Y-%m-%dT%H:%M:%S"))
        except ValueError:
            pass
    heartbeat = read_heartbeat(store.work(stage.id))
    return now if heartbeat is None else heartbeat.updated


def _bad_nodes(cause: str, tail: str, attempt: Attempt) -> list[str]:
    """The nodes at fault, as far as the log names them; a job on one node names it by running there."""
    if cause not in ("node failure", "bad node"):
        return []
    named = {first or second for first, second in BAD_NODE.findall(tail)}
    runs = attempt.runs()
    if not named and runs and "[" not in runs[-1].nodes and "," not in runs[-1].nodes:
        named = {runs[-1].nodes}
    return sorted(named - {""})


def _state_from(tail: str) -> str:
    return next((state for words, state in LOG_STATES.items() if words in tail), "")


def log_tail(logs: list[Path], lines: int = LOG_TAIL_LINES) -> str:
    """The last lines of every log, each under its name where there are several."""
    parts = []
    for log in logs:
        with log.open("rb") as stream:
            stream.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            text = stream.read().decode("utf-8", errors="replace")
        kept = [line for line in text.splitlines() if line.strip() and "submitit " not in line][-lines:]
        if kept:
            parts.append("\n".join([f"  {log.name}:", *(f"    {line}" for line in kept)]))
    return "\n".join(parts)
