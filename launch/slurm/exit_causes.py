"""Causes of attempts that ended without an artifact, found from what ranks left, what Slurm says and what logs show."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from pathlib import Path

from hfprune_launch.slurm.attempt_records import End
from hfprune_launch.slurm.attempts import Attempts, JobAttempt
from hfprune_launch.slurm.avoided_nodes import avoided_by, nodes_at_fault
from hfprune_launch.slurm.causes import Cause
from hfprune_launch.slurm.job_info import DEPENDENCY, HELD, NEVER, JobInfo
from hfprune_launch.slurm.log_signs import (
    COLLECTIVE_TIMEOUT,
    OUT_OF_MEMORY,
    SETUP_FAILED,
    SIGNALS,
    START,
    find_sign,
    first_death,
    last_start,
    since_last_start,
)
from hfprune_launch.slurm.progress import as_progress, fruitless_starts
from hfprune_launch.stage.logs import end_of_log

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Failure, Heartbeat
from hfprune_dist.store.stage import Stage

WHAT_TO_RAISE = "raise time_minutes or signal_seconds in the profile, or lower runtime.save_every_steps"
# This many starts of a job in a row may be interrupted without getting any further.
FRUITLESS_STARTS = 3
LOG_TAIL_LINES = 12
LOG_TAIL_BYTES = 64 * 1024
STATE_CAUSES = {
    "NODE_FAIL": Cause.NODE_FAILURE,
    "BOOT_FAIL": Cause.NODE_FAILURE,
    "LAUNCH_FAILED": Cause.BAD_NODE,
    "PREEMPTED": Cause.PREEMPTED,
}
# Messages of Slurm in a job's log, used if neither squeue nor sacct remembers the job. The step of a job is also
# cancelled if one of its ranks has died.
LOG_STATES = {
    "NODE_FAIL": re.compile(r"DUE TO NODE FAILURE"),
    "PREEMPTED": re.compile(r"DUE TO PREEMPTION"),
    "TIMEOUT": re.compile(r"DUE TO TIME LIMIT"),
    "REQUEUED": re.compile(r"DUE TO JOB REQUEUE"),
    "CANCELLED": re.compile(r"\*\*\* JOB \d+ .*CANCELLED AT"),
}
# Lines of srun, of slurmstepd, and of bash about the batch script.
BY_SLURM = re.compile(r"srun: |slurmstepd\S*: |\S*(slurm_script|environment\.sh): |" + re.escape(SETUP_FAILED))


@dataclass(frozen=True)
class _Evidence:
    """The evidence that an attempt has left.

    Attributes:
        state: the job's last state in Slurm; empty if it isn't known.
        reason: why it waited or ended, as squeue names it; empty if it isn't known.
        failures: failures reported by ranks of this attempt, the best explanation first.
        heartbeat: the stage's last heartbeat; None if there was none.
        text: lines of the logs since the job's last start: the last ones, and all that Slurm wrote.
        tail: the last lines of the logs, for the user.
    """

    store: Store
    stage: Stage
    attempt: JobAttempt
    state: str
    reason: str
    failures: list[Failure]
    heartbeat: Heartbeat | None
    text: str
    tail: str

    @property
    def job(self) -> str:
        return f"job {self.attempt.job_id}"

    @property
    def said(self) -> str:
        return "\n".join([*(failure.message for failure in self.failures), self.text])

    @property
    def failure(self) -> Failure | None:
        """The failure that caused the others; None if every rank only says that it lost another one."""
        return next((it for it in self.failures if not it.is_consequence), None)


# Cause and message, or None if the evidence shows nothing of the kind.
_Explanation = tuple[str, str] | None


def explain_end(store: Store, stage: Stage, attempt: JobAttempt, job: JobInfo | None) -> End:
    """Return how an attempt whose job is over ended; only a verified artifact counts as success."""
    evidence = _collect(store, stage, attempt, job)
    cause, message = _cause(evidence)
    ended = _end_of(job, evidence.heartbeat)
    seconds = attempt.run_seconds(ended)
    return End(
        cause=cause,
        message=message,
        at=ended,
        state=evidence.state,
        nodes=job.nodes if job is not None else "",
        bad_nodes=nodes_at_fault(cause, evidence.text, attempt),
        log_tail=evidence.tail if cause != Cause.DONE else "",
        run_seconds=seconds,
        gpu_seconds=seconds * attempt.intent.gpus,
        progress=as_progress(evidence.heartbeat),
    )


def _collect(store: Store, stage: Stage, attempt: JobAttempt, job: JobInfo | None) -> _Evidence:
    logs = attempt.logs()
    text = _telling_lines(logs)
    state = job.state if job is not None else _state_from(text)
    intent, handle = attempt.intent, store.handle(stage.id)
    failures = [failure for failure in handle.failures() if failure.is_of(intent.number, intent.created)]
    reason = job.reason if job is not None else ""
    return _Evidence(store, stage, attempt, state, reason, failures, handle.heartbeat(), text, log_tail(logs))


def _cause(evidence: _Evidence) -> tuple[str, str]:
    """Return cause and message by the first explanation that fits; those that explain most come first."""
    if evidence.store.handle(evidence.stage.id).is_done():
        return Cause.DONE, ""
    explanations = (
        _cancelled,
        _no_node_suits,
        _left_to_another,
        _known_to_a_rank,
        _out_of_memory,
        _ended_by_slurm,
        _known_words,
        _signal,
        _our_mistake,
        _collective_timeout,
    )
    for explain in explanations:
        if found := explain(evidence):
            return found
    return Cause.KILLED, f"{evidence.job} ({evidence.state or 'state unknown'}): {_without_a_word(evidence)}"


def _cancelled(evidence: _Evidence) -> _Explanation:
    if evidence.state != "CANCELLED":
        return None
    if _was_dropped(evidence):
        return Cause.DEPENDENCY, f"{evidence.job} was dropped, as a job on which it depends did not succeed"
    return Cause.CANCELLED, f"{evidence.job} was cancelled; run the same command again to go on"


def _was_dropped(evidence: _Evidence) -> bool:
    """Return whether Slurm itself cancelled a job, because one on which it depends did not succeed.

    That job may have died after it had made what this one needs, so the artifact may be there by now. A job that Slurm
    drops as soon as it is submitted can have any reason; one that somebody cancelled while it waited for others, or was
    held, keeps the reason for which it waited.
    """
    if evidence.reason == NEVER:
        return bool(evidence.stage.needs)
    if evidence.reason == DEPENDENCY or evidence.reason.startswith(HELD) or evidence.attempt.runs():
        return False
    return any(not evidence.store.handle(need).is_done() for need in evidence.stage.needs)


def _no_node_suits(evidence: _Evidence) -> _Explanation:
    if (evidence.state, evidence.reason) != ("FAILED", "BadConstraints"):
        return None
    nodes = avoided_by(evidence.attempt, Attempts(evidence.store.root).of(evidence.stage.id))
    if nodes:
        return Cause.NODES_NEEDED, f"{evidence.job} can't do without {', '.join(nodes)}, where the stage has failed"
    return Cause.REFUSED, f"{evidence.job}: no node suits what it asks for (BadConstraints); check the profile"


def _left_to_another(evidence: _Evidence) -> _Explanation:
    """Explain a job whose last start left the stage to another process; the files in the work folder are then its."""
    runs = evidence.attempt.runs()
    if not runs or runs[-1].how != "duplicate":
        return None
    return Cause.DUPLICATE, f"{evidence.job} left the stage to another process that has claimed it"


def _known_to_a_rank(evidence: _Evidence) -> _Explanation:
    failure = evidence.failure
    if failure is None or failure.cause in (Cause.CODE, Cause.KILLED):
        return None
    return failure.cause, failure.message


def _out_of_memory(evidence: _Evidence) -> _Explanation:
    if evidence.state != "OUT_OF_MEMORY" and find_sign(evidence.said, [OUT_OF_MEMORY]) is None:
        return None
    last_words = "\n".join([*(failure.message for failure in evidence.failures), evidence.tail])
    return OUT_OF_MEMORY.cause, f"{evidence.job} {OUT_OF_MEMORY.meaning}:\n{last_words}"


def _ended_by_slurm(evidence: _Evidence) -> _Explanation:
    if evidence.state in STATE_CAUSES:
        return STATE_CAUSES[evidence.state], f"{evidence.job} ended by Slurm: {evidence.state}"
    if evidence.state == "DEADLINE":  # even of a job that has not started
        return Cause.RESOURCE_LIMIT, f"{evidence.job} met the deadline that the profile's sbatch sets; set a later one"
    return _time_limit(evidence) if evidence.state == "TIMEOUT" else None


def _time_limit(evidence: _Evidence) -> tuple[str, str]:
    """Explain a job that reached its time limit before it had saved its work and requeued itself. What counts is
    whether it got further than the starts before it.
    """
    attempt, runs = evidence.attempt, evidence.attempt.runs()
    reached = f"{evidence.job} reached its time limit of {attempt.intent.time_minutes} minutes"
    # A start that saved its work, and waited in vain for Slurm to requeue it, has recorded how far it got.
    has_recorded = bool(runs) and runs[-1].ended is not None
    progress = attempt.earlier_progress()
    if fruitless_starts(progress if has_recorded else [*progress, as_progress(evidence.heartbeat)]) == 0:
        return Cause.TIME_LIMIT, f"{reached}, and got further"
    return Cause.NO_PROGRESS, f"{reached} without getting further than before; {WHAT_TO_RAISE}"


def _known_words(evidence: _Evidence) -> _Explanation:
    found = find_sign(evidence.said)
    if found is None:
        return None
    sign, words = found
    return sign.cause, f"{evidence.job}: {sign.meaning}: {words}\nits log ends with:\n{evidence.tail}"


def _signal(evidence: _Evidence) -> _Explanation:
    death = first_death(evidence.text)
    if death is None or death.how not in SIGNALS:
        return None
    name, cause, meaning = SIGNALS[death.how]
    what = f"rank {death.ranks} on {death.node} was ended by {name} ({death.how.lower()}): {meaning}"
    return cause, f"{evidence.job}: {what}\nits log ends with:\n{evidence.tail}"


def _our_mistake(evidence: _Evidence) -> _Explanation:
    failure = evidence.failure
    return (Cause.CODE, failure.message) if failure is not None and failure.cause == Cause.CODE else None


def _collective_timeout(evidence: _Evidence) -> _Explanation:
    found = find_sign(evidence.said, [COLLECTIVE_TIMEOUT])
    if found is None:
        return None
    waited = sorted(failure.rank for failure in evidence.failures if failure.rank >= 0)
    who = f" (ranks that waited: {', '.join(map(str, waited))})" if waited else ""
    meaning = f"{COLLECTIVE_TIMEOUT.meaning}{who}"
    return COLLECTIVE_TIMEOUT.cause, f"{evidence.job}: {meaning}: {found[1]}\n{evidence.tail}"


def _without_a_word(evidence: _Evidence) -> str:
    attempt, death = evidence.attempt, first_death(evidence.text)
    if not attempt.logs() and not attempt.runs():
        return (
            f"it has left no log in {attempt.folder}: its nodes may not see that folder; --out must lie on a file "
            "system that all nodes share"
        )
    who = "a rank died" if death is None else f"rank {death.ranks} on {death.node} ended first ({death.how.lower()})"
    return f"{who} without a message\nits log ends with:\n{evidence.tail}"


def never_gets_further(attempt: JobAttempt) -> Failure | None:
    """Return why an interrupted job must not be requeued, or None if its last starts got further than those before."""
    starts = fruitless_starts(attempt.earlier_progress())
    if starts < FRUITLESS_STARTS:
        return None
    message = (
        f"job {attempt.job_id} was interrupted, and its last {starts} starts of {attempt.intent.time_minutes} minutes "
        f"each got no further than those before; {WHAT_TO_RAISE}"
    )
    return Failure(Cause.NO_PROGRESS, message, 0, time.time(), attempt.intent.number)


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
    newest = max((start for start in map(last_start, texts) if start is not None), default=None)
    for text in (it for it in texts if last_start(it) in (None, newest)):
        lines = [line for line in since_last_start(text).splitlines() if _says_something(line)]
        early, late = lines[:-LOG_TAIL_LINES], lines[-LOG_TAIL_LINES:]
        kept += [*(line for line in early if BY_SLURM.match(line)), *late]
    return "\n".join(kept)


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
    return bool(line.strip()) and "submitit " not in line and not line.startswith(START)
