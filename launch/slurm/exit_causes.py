"""Causes of attempts that ended without an artifact.

The job and its ranks record their own end; Slurm's state and words in the logs count where they could record nothing.
"""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from hfprune_launch.slurm.attempt_records import SCRIPT, End, read_script
from hfprune_launch.slurm.attempts import Attempts, JobAttempt
from hfprune_launch.slurm.causes import Cause
from hfprune_launch.slurm.job_info import DEPENDENCY, HELD, NEVER, JobInfo
from hfprune_launch.slurm.progress import as_progress, fruitless_starts
from hfprune_launch.stage.logs import end_of_log

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.file_system import full_disk
from hfprune_dist.store.heartbeat import Failure, Heartbeat
from hfprune_dist.store.stage import Stage

WHAT_TO_RAISE = "raise time_minutes or signal_seconds in the profile, or lower runtime.save_every_steps"
# This many starts of a job in a row may be interrupted without getting any further.
FRUITLESS_STARTS = 3
# The nodes at fault in this many previous attempts are avoided.
EXCLUDING_ATTEMPTS = 3
LOG_TAIL_LINES = 12
LOG_TAIL_BYTES = 64 * 1024
# What the batch script and every rank write first, followed by the number of times the job had been requeued.
START = "hfprune: start"
# Messages of Slurm in a job's log, for jobs that neither squeue nor accounting remembers.
LOG_STATES = {
    "NODE_FAIL": re.compile(r"DUE TO NODE FAILURE"),
    "PREEMPTED": re.compile(r"DUE TO PREEMPTION"),
    "TIMEOUT": re.compile(r"DUE TO TIME LIMIT"),
    "CANCELLED": re.compile(r"\*\*\* JOB \d+ ON \S+ CANCELLED AT \S+ \*\*\*"),
    "OUT_OF_MEMORY": re.compile(r"oom[-_ ]kill|exceeded (job |step )?memory limit", re.IGNORECASE),
}
# Words of Slurm and of drivers, for which ranks have none of their own, and their causes; the first that occur count.
WORDS = (
    (
        r"prolog.*(failed|did not exit normally|error)|couldn't chdir to|could not open (stdout|stderr) file"
        r"|stale file handle|execve\(\):.*no such file|task launch for .* failed on node|invalid job credential"
        r"|munge decode failed|uncorrectable ECC|has fallen off the bus|no CUDA-capable device"
        r"|CUDA-capable device\(s\) is/are busy|CUDA driver version is insufficient",
        Cause.BAD_NODE,
        "a node could not run it; if that persists, tell the cluster's administrators",
    ),
    (
        r"invalid mpi type|mpi plugin|plugin name for mpi/|unable to satisfy cpu bind|cpu binding outside"
        r"|are mutually exclusive|srun: ((error: )?unable to create step|fatal|unrecognized option|invalid option)",
        Cause.INPUT,
        "srun refused to start the ranks; check the profile, above all its sbatch and srun_args",
    ),
)
SIGNALS = {
    "Segmentation fault": "SIGSEGV",
    "Bus error": "SIGBUS",
    "Aborted": "SIGABRT",
    "Illegal instruction": "SIGILL",
    "Killed": "SIGKILL",
    "Terminated": "SIGTERM",
}
BY_SLURM = re.compile(r"srun: |slurmstepd\S*: ")
NODE_AT_FAULT = re.compile(
    r"srun: error: Node failure on (\S+)|task launch for .* failed on node ([^\s:]+)", re.IGNORECASE
)
_DEATH = re.compile(r"^srun: error: (\S+): tasks? ([\d,-]+): (.+?)(?: \(core dumped\))?$", re.MULTILINE)


class Death(NamedTuple):
    """The first rank that srun saw end badly, whereupon it ended all others; node and ranks are in Slurm's notation.

    ``how`` is in srun's words, e.g. ``Exited with exit code 1`` or ``Segmentation fault``.
    """

    node: str
    ranks: str
    how: str

    def __str__(self) -> str:
        end = f"was ended by {SIGNALS[self.how]}" if self.how in SIGNALS else f"ended first ({self.how.lower()})"
        return f"rank {self.ranks} on {self.node} {end}"


def explain_end(store: Store, stage: Stage, attempt: JobAttempt, job: JobInfo | None) -> End:
    """Return how an attempt whose job is over ended; only a verified artifact counts as success.

    Args:
        job: what Slurm says of it; None if it has forgotten the job.
    """
    handle, logs = store.handle(stage.id), attempt.logs()
    text, heartbeat = _telling_lines(logs), handle.heartbeat()
    state = job.state if job is not None else _state_from(text)
    tail = log_tail(logs)
    cause: str = Cause.DONE
    message = ""
    if handle.is_done():
        tail = ""
    else:
        reason = job.reason if job is not None else ""
        cause, message = _cause(store, stage, attempt, state=state, reason=reason, text=text, tail=tail)
    ended = _end_of(job, heartbeat)
    seconds = attempt.run_seconds(ended)
    return End(
        cause=cause,
        message=message,
        at=ended,
        state=state,
        nodes=job.nodes if job is not None else "",
        bad_nodes=_nodes_at_fault(text, attempt) if cause == Cause.BAD_NODE else [],
        log_tail=tail,
        run_seconds=seconds,
        gpu_seconds=seconds * attempt.intent.gpus,
        progress=as_progress(heartbeat),
    )


def _cause(
    store: Store, stage: Stage, attempt: JobAttempt, *, state: str, reason: str, text: str, tail: str
) -> tuple[str, str]:
    """Return cause and message; what explains most comes first."""
    job, runs, recorded = f"job {attempt.job_id}", attempt.runs(), attempt.exit_record()
    found = store.handle(stage.id).failures()
    failures = [it for it in found if it.is_of(attempt.intent.number, attempt.intent.created)]
    failure = next((it for it in failures if not it.is_consequence), None)
    if state == "CANCELLED":
        if _was_dropped(store, stage, reason, has_started=bool(runs)):
            return Cause.NOT_RUN, f"{job} was dropped, as a job on which it depends did not succeed"
        return Cause.CANCELLED, f"{job} was cancelled; run the same command again to go on"
    if (state, reason) == ("FAILED", "BadConstraints"):
        if nodes := _avoided_by(attempt, Attempts(store.root).of(stage.id)):
            return Cause.NOT_RUN, f"{job} can't do without {', '.join(nodes)}, where the stage has failed"
        return Cause.INPUT, f"{job}: no node suits what it asks for (BadConstraints); check the profile"
    if runs and runs[-1].how == "duplicate":
        return Cause.NOT_RUN, f"{job} left the stage to another process that has claimed it"
    if failure is not None and failure.cause != Cause.CODE:
        return failure.cause, failure.message
    if state == "OUT_OF_MEMORY" or LOG_STATES["OUT_OF_MEMORY"].search(text):
        return Cause.OUT_OF_MEMORY, f"{job} ran out of memory; give the stage more nodes or memory:\n{tail}"
    if state in ("NODE_FAIL", "BOOT_FAIL", "LAUNCH_FAILED"):
        return Cause.BAD_NODE, f"{job} ended by Slurm: {state}"
    if state == "PREEMPTED":
        return Cause.INTERRUPTED, f"{job} ended by Slurm: {state}"
    if state == "DEADLINE":  # even of a job that has not started
        return Cause.INPUT, f"{job} met the deadline that the profile's sbatch sets; set a later one"
    if state == "TIMEOUT":
        return _time_limit(attempt, as_progress(store.handle(stage.id).heartbeat()))
    if recorded is not None and recorded.message:
        return Cause.INPUT, f"{job}: {recorded.message} (exit code {recorded.code}); correct it\n{tail}"
    for words, cause, meaning in WORDS:
        if line := re.search(f"^.*({words}).*$", text, re.IGNORECASE | re.MULTILINE):
            return cause, f"{job}: {meaning}: {line[0].strip()}\nits log ends with:\n{tail}"
    death = _first_death(text)
    if failure is not None and (death is None or death.how not in SIGNALS):
        return Cause.CODE, failure.message
    if full := full_disk(store.root):  # on which nobody could record a reason
        return Cause.INPUT, full
    return Cause.KILLED, f"{job} ({state or 'state unknown'}): {_without_a_word(attempt, death, tail)}"


def _was_dropped(store: Store, stage: Stage, reason: str, has_started: bool) -> bool:
    """Return whether Slurm itself cancelled a job, because one on which it depends did not succeed.

    That job may have died after it had made what this one needs, so the artifact may be there by now. A job that Slurm
    drops as soon as it is submitted can have any reason; one that somebody cancelled while it waited for others, or was
    held, keeps the reason for which it waited.
    """
    if reason == NEVER:
        return bool(stage.needs)
    if has_started or reason == DEPENDENCY or reason.startswith(HELD):
        return False
    return any(not store.handle(need).is_done() for need in stage.needs)


def _time_limit(attempt: JobAttempt, progress: dict[str, object] | None) -> tuple[str, str]:
    """Explain a job that reached its time limit before it had saved its work and requeued itself. What counts is
    whether it got further than the starts before it.
    """
    runs, earlier = attempt.runs(), attempt.earlier_progress()
    reached = f"job {attempt.job_id} reached its time limit of {attempt.intent.time_minutes} minutes"
    # A start that saved its work, and waited in vain for Slurm to requeue it, has recorded how far it got.
    has_recorded = bool(runs) and runs[-1].ended is not None
    # The first start of all may have spent its time on what is not counted, such as loading a model.
    if fruitless_starts(earlier if has_recorded else [*earlier, progress]) < FRUITLESS_STARTS:
        return Cause.INTERRUPTED, reached
    return Cause.INPUT, f"{reached} {FRUITLESS_STARTS} times without getting further than before; {WHAT_TO_RAISE}"


def _without_a_word(attempt: JobAttempt, death: Death | None, tail: str) -> str:
    if not attempt.logs() and not attempt.runs():
        return (
            f"it has left no log in {attempt.folder}: its nodes may not see that folder; --out must lie on a file "
            "system that all nodes share"
        )
    return f"{death or 'a rank died'} without a message\nits log ends with:\n{tail}"


def never_gets_further(attempt: JobAttempt) -> Failure | None:
    """Return why an interrupted job must not be requeued, or None if its last starts got further than those before."""
    starts = fruitless_starts(attempt.earlier_progress())
    if starts < FRUITLESS_STARTS:
        return None
    message = (
        f"job {attempt.job_id} was interrupted, and its last {starts} starts of {attempt.intent.time_minutes} minutes "
        f"each got no further than those before; {WHAT_TO_RAISE}"
    )
    return Failure(Cause.INPUT, message, 0, time.time(), attempt.intent.number)


# Nodes at fault.


def _nodes_at_fault(text: str, attempt: JobAttempt) -> list[str]:
    """Return the nodes at fault: those that the log names, else the only node of the job's last start."""
    named = {first or second for first, second in NODE_AT_FAULT.findall(text)}
    death = _first_death(text)
    if not named and death is not None:
        named = {death.node}
    if not named and (runs := attempt.runs()):
        named = {runs[-1].nodes}
    return sorted(node for node in named if node and "[" not in node and "," not in node)


def nodes_to_avoid(attempts: Sequence[JobAttempt]) -> list[str]:
    """Return the nodes that a stage's next job avoids; none if Slurm could not start the last one without them."""
    ends = [end for attempt in attempts if (end := attempt.end) is not None]
    if ends and ends[-1].cause == Cause.NOT_RUN and ends[-1].state == "FAILED":
        return []
    return sorted({node for end in ends[-EXCLUDING_ATTEMPTS:] for node in end.bad_nodes})


def _avoided_by(attempt: JobAttempt, attempts: Sequence[JobAttempt]) -> list[str]:
    """Return the nodes that an attempt's job avoids since the stage failed there."""
    excluded = re.search("^#SBATCH --exclude=(.*)$", read_script(attempt.folder / SCRIPT), re.MULTILINE)
    names = excluded[1].strip("'").split(",") if excluded else []
    at_fault = {node for it in attempts if (end := it.end) is not None for node in end.bad_nodes}
    return sorted(at_fault.intersection(names))


# Logs.


def _first_death(text: str) -> Death | None:
    found = _DEATH.search(text)
    return None if found is None else Death(found[1], found[2], found[3])


def _end_of(job: JobInfo | None, heartbeat: Heartbeat | None) -> float:
    """Return the unix time at which a job ended: from Slurm, its last heartbeat, or else the present."""
    if job is not None:
        try:
            return time.mktime(time.strptime(job.end, "%Y-%m-%dT%H:%M:%S"))
        except ValueError:
            pass
    return time.time() if heartbeat is None else heartbeat.updated


def _state_from(text: str) -> str:
    return next((state for state, words in LOG_STATES.items() if words.search(text)), "")


def _telling_lines(logs: list[Path]) -> str:
    """Return the lines of every log since the job's last start: its last ones, and all that Slurm wrote before them.

    A log that knows only of earlier starts has none: the last one ended before this rank began.
    """
    kept = []
    texts = [end_of_log(log, LOG_TAIL_BYTES) for log in logs]
    newest = max((start for start in map(_last_start, texts) if start is not None), default=None)
    for text in (it for it in texts if _last_start(it) in (None, newest)):
        last = text.rpartition(f"{START} ")[2].partition("\n")[2] if _last_start(text) is not None else text
        lines = [line for line in last.splitlines() if _says_something(line)]
        early, late = lines[:-LOG_TAIL_LINES], lines[-LOG_TAIL_LINES:]
        kept += [*(line for line in early if BY_SLURM.match(line)), *late]
    return "\n".join(kept)


def _last_start(text: str) -> int | None:
    """Return the number of the last start that a log has lines of, counted from 0; None if it doesn't say."""
    starts = re.findall(rf"^{START} (\d+)$", text, re.MULTILINE)
    return int(starts[-1]) if starts else None


def log_tail(logs: list[Path], lines: int = LOG_TAIL_LINES) -> str:
    """Return the last lines of every log, each under the log's name."""
    parts = []
    for log in logs:
        text = end_of_log(log, LOG_TAIL_BYTES)
        kept = [line for line in text.splitlines() if _says_something(line)][-lines:]
        if kept:
            parts.append("\n".join([f"  {log.name}:", *(f"    {line}" for line in kept)]))
    return "\n".join(parts)


def _says_something(line: str) -> bool:
    return bool(line.strip()) and not line.startswith(START)
