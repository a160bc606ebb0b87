"""Why attempts ended. A job and its ranks record their own end; Slurm's word, and its words in the logs, count only
where they could record none.
"""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from hfprune_launch.slurm.commands import DEPENDENCY, FORGOTTEN, NEVER, JobInfo

from hfprune_dist.store.atomic_files import unwritable
from hfprune_dist.store.attempts import Attempt, Cause, End, Ledger, end_of_log
from hfprune_dist.store.stage import Stage

# Cause -> how often a launcher tries again by itself; 0 for the others. A new run of the command always tries again.
RETRIES: Mapping[str, int] = {
    Cause.INTERRUPTED: 1000,  # a job may be dropped each time that one which it needs is interrupted
    Cause.KILLED: 3,
    Cause.LOST_INPUT: 2,
}

LOG_TAIL_LINES = 12
LOG_TAIL_BYTES = 64 * 1024
# What the batch script and every rank write first, followed by the number of times the job had been requeued.
START = "hfprune: start"
# A node could not launch the job, or read the user's environment: Slurm holds it for ever, even once that is repaired.
LAUNCH_FAILED = re.compile(r"requeued.held|JobHoldMaxRequeue", re.IGNORECASE)
# What srun says if the controller, which may restart between two stages, does not answer.
NO_CONTROLLER = "Unable to (confirm allocation|create step).*(contact slurm controller|timed out|onnection refused)"
MEMORY = "it ran out of memory; give the stage more nodes or memory"
# States of Slurm's, or reasons for them, that need no further explanation.
STATES = {
    **dict.fromkeys(("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED"), (Cause.KILLED, "its node failed")),
    "PREEMPTED": (Cause.INTERRUPTED, "it was preempted"),
    "DEADLINE": (Cause.INPUT, "it hit the deadline that the profile's sbatch sets; set a later one"),
    "BadConstraints": (Cause.INPUT, "no node qualifies; check the profile"),
    "OUT_OF_MEMORY": (Cause.OUT_OF_MEMORY, MEMORY),
}
# Words of Slurm and of drivers, for which ranks have none of their own, and of ranks that could record none.
WORDS = (
    (
        "no space left on device|disk quota exceeded|read-only file system",
        Cause.INPUT,
        "it could not write; fix that, and run the same command again",
    ),
    (r"oom[-_ ]kill|Out Of Memory|exceeded (job |step )?memory limit", Cause.OUT_OF_MEMORY, MEMORY),
    (
        r"slurm.*prolog.*(fail|error)|couldn't chdir to|stale file handle|input/output error|transport endpoint"
        r"|invalid job credential|munge decode failed|uncorrectable ECC|fallen off the bus|no CUDA-capable device"
        rf"|CUDA driver version is insufficient|{NO_CONTROLLER}",
        Cause.KILLED,
        "a node could not run it; if that persists, tell the cluster's administrators",
    ),
    (
        r"invalid mpi type|mpi plugin|plugin name for mpi/|unable to satisfy cpu bind|cpu binding outside"
        r"|are mutually exclusive|srun: ((error: )?unable to create step|fatal|unrecognized option|invalid option)",
        Cause.INPUT,
        "srun refused to start the ranks; check the profile, above all its sbatch and srun_args",
    ),
)


def explain_end(ledger: Ledger, stage: Stage, attempt: Attempt, job: JobInfo | None) -> End:
    """Return how an attempt ended, given what Slurm says of its job; only a verified artifact counts as success."""
    handle = ledger.store.handle(stage.id)
    heartbeat = handle.heartbeat()
    cause, message = (Cause.DONE, "") if handle.is_done() else _cause(ledger, stage, attempt, job)
    return End(cause, message, time.time() if heartbeat is None else heartbeat.updated)


def _cause(ledger: Ledger, stage: Stage, attempt: Attempt, job: JobInfo | None) -> tuple[str, str]:
    """Return cause and message; what explains most comes first."""
    if attempt.job_id is None:
        return Cause.INTERRUPTED, "it did not reach Slurm: sbatch gave no answer, or its launcher died"
    name, runs, tail = f"job {attempt.job_id}", attempt.runs(), log_tail(attempt.logs())
    state, reason = (job.state, job.reason) if job is not None else (FORGOTTEN, "")
    nodes = f" on {job.nodes}" if job is not None and job.nodes else ""
    how = runs[-1].how if runs else None
    text = "\n".join(end_of_log(log, LOG_TAIL_BYTES).rpartition(START)[2] for log in attempt.logs())  # the last start's
    if how == "cancelled" or state == "CANCELLED":
        return _cancelled(ledger, attempt, reason, has_started=bool(runs))
    if attempt.intent.leader and not (runs or attempt.logs() or attempt.exit_record()):
        return Cause.INTERRUPTED, f"{name} ended before it reached this stage"
    if how == "done":
        return Cause.LOST_INPUT, f"{name} made its artifact, which has been damaged or removed since"
    if how == "duplicate":
        return Cause.INTERRUPTED, f"{name} left the stage to another process that has claimed it"
    said = [each for each in attempt.failures() if not each.is_consequence]
    if said:
        return said[0].cause, said[0].message
    code, problem = attempt.exit_record() or (0, "")
    if problem:
        return Cause.INPUT, f"{name}: {problem} (exit code {code}); correct it\n{tail}"
    if state == "TIMEOUT" or "DUE TO TIME LIMIT" in text:
        reached = f"{name} reached its time limit of {attempt.intent.time_minutes} minutes before it had saved"
        cause = Cause.INTERRUPTED if _got_further(ledger, stage) else Cause.KILLED
        return cause, f"{reached}; raise time_minutes or signal_seconds in the profile"
    if told := STATES.get(state) or STATES.get(reason):
        return told[0], f"{name}{nodes}: {told[1]}\n{tail}".rstrip()
    for words, cause, meaning in WORDS:
        if line := re.search(f"^.*({words}).*$", text, re.IGNORECASE | re.MULTILINE):
            return cause, f"{name}: {meaning}: {line[0].strip()}\nits log ends with:\n{tail}"
    if why := unwritable(ledger.store.root):  # where nobody could record a reason
        return Cause.INPUT, why
    if not runs and not attempt.logs():
        if state == FORGOTTEN:
            return Cause.INTERRUPTED, f"{name} never began, and Slurm has forgotten why"
        where = "its nodes may not see that folder; --out must lie on a file system that all nodes share"
        return Cause.KILLED, f"{name} has left no log in {attempt.folder}: {where}"
    is_silent = not log_tail([log for log in attempt.logs() if "srun" not in log.name])
    note = ", not even in its log; was the disk full, or read-only?" if is_silent else ""
    return Cause.KILLED, f"{name} ({state}): a rank died without a message{note}\nits log ends with:\n{tail}".rstrip()


def _got_further(ledger: Ledger, stage: Stage) -> bool:
    """Return whether a stage is further than its jobs were whenever one of them started or ended by itself."""
    beat = ledger.store.handle(stage.id).heartbeat()
    earlier = [run.progress for attempt in ledger.jobs_of(stage.id) for run in attempt.runs() if run.progress]
    return beat is not None and all(at["phase"] != beat.phase or at["done"] < beat.done for at in earlier)


def _cancelled(ledger: Ledger, attempt: Attempt, reason: str, has_started: bool) -> tuple[str, str]:
    """Tell who cancelled a job: we, as it would have waited for ever; Slurm, as one that it needs did not succeed; or
    somebody.

    A job that Slurm drops as soon as it is submitted can have any reason; one that somebody cancelled while it waited
    for others, or was held, keeps the reason for which it waited.
    """
    name, needs = f"job {attempt.job_id}", attempt.intent.needs
    if LAUNCH_FAILED.search(reason):
        return Cause.KILLED, f"{name} could not be started and would have waited for ever: {reason}"
    waited = has_started or reason == DEPENDENCY or reason.startswith("JobHeld")
    lacks = not waited and any(not ledger.store.handle(need).is_done() for need in needs)
    if lacks or (reason == NEVER and needs):
        return Cause.INTERRUPTED, f"{name} was dropped, as a job on which it depends did not succeed"
    return Cause.CANCELLED, f"{name} was cancelled; run the same command again to resume"


def log_tail(logs: Sequence[Path], lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of every log, each under the log's name."""
    parts = []
    for log in logs:
        text = end_of_log(log, LOG_TAIL_BYTES)
        kept = [line for line in text.splitlines() if line.strip() and not line.startswith(START)][-lines:]
        if kept:
            parts.append("\n".join([f"  {log.name}:", *(f"    {line}" for line in kept)]))
    return "\n".join(parts)
