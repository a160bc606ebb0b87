"""The states of open attempts' jobs, as far as squeue, the controller or accounting know them.

squeue lists a user's jobs. A job's absence from that list says nothing yet: the answer may be cut short between two
lines, or the job may have ended long ago. So the controller is asked about it (scontrol), and if it knows no such job,
accounting (sacct). A job that none of them knows counts as gone after some minutes in which nothing in the store shows
that it lives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune_launch.slurm.attempts import Attempts, JobAttempt, with_job_ids
from hfprune_launch.slurm.commands import SlurmCommands, SlurmUnavailableError
from hfprune_launch.slurm.job_info import JobInfo
from hfprune_launch.stage.stage_file import find_stage_file

from hfprune_dist.store.artifacts import Store

# Seconds for which a job must have been unknown, without a sign of life, before it counts as gone.
GONE_AFTER_S = 180.0
# Seconds between two questions to the controller about a job that squeue does not list.
ASK_AGAIN_S = 60.0


@dataclass(frozen=True)
class JobState:
    """Knowledge about an attempt's job.

    Attributes:
        job: what Slurm says about it; None if it says nothing.
        is_gone: whether the job counts as over although Slurm says nothing about it, unless the stage's claim is held.
            If this is False and ``job`` is None, the job may be running.
    """

    job: JobInfo | None
    is_gone: bool = False

    @property
    def is_over(self) -> bool:
        """Whether the job has ended, or counts as over."""
        return self.is_gone or (self.job is not None and not self.job.is_live)


UNKNOWN = JobState(None)
GONE_STATE = JobState(None, is_gone=True)


@dataclass
class _Absence:
    """The time since which squeue has not listed a job, and the store's signs of life then. Times are of the clock."""

    since: float
    signs: object
    asked: float | None = None


class JobTracker:
    """Looks for jobs, and remembers since when each missing one has been missing.

    Args:
        clock: seconds of a monotonic clock.

    Attributes:
        jobs: the user's jobs that the last look showed, by id.
    """

    def __init__(self, store: Store, slurm: SlurmCommands, clock: Callable[[], float]) -> None:
        self._store = store
        self._slurm = slurm
        self._clock = clock
        self._absences: dict[Path, _Absence] = {}
        self._states: dict[Path, JobState] = {}
        self.jobs: dict[str, JobInfo] = {}

    def look(self, attempts: Iterable[tuple[str, JobAttempt]]) -> None:
        """Ask Slurm about all jobs.

        Args:
            attempts: job ids and their open attempts; several have one id if a cluster that was set up anew reuses it.

        Raises:
            SlurmUnavailableError: if squeue did not answer.
        """
        self.jobs = self._slurm.jobs()
        by_name = {job.name: job for job in sorted(self.jobs.values(), key=lambda job: job.is_live)}
        self._states = {}
        unlisted = []
        for job_id, attempt in attempts:
            job = by_name.get(attempt.intent.job_name)
            if job is not None:
                self._absences.pop(attempt.folder, None)
                self._states[attempt.folder] = JobState(job)
            else:
                unlisted.append((job_id, attempt))
        self._ask_about(unlisted)

    def named(self, job_name: str) -> JobInfo | None:
        """Return the job that squeue lists under a name; a live one if there are several."""
        found = [job for job in self.jobs.values() if job.name == job_name]
        return max(found, key=lambda job: job.is_live, default=None)

    def state_of(self, attempt: JobAttempt) -> JobState:
        """Return what the last look showed about an attempt's job."""
        return self._states.get(attempt.folder, UNKNOWN)

    def is_missing(self, attempt: JobAttempt) -> bool:
        """Return whether nothing in Slurm knew a job."""
        return attempt.folder in self._absences

    def missing_for(self, attempt: JobAttempt) -> float:
        """Return the seconds since a job was last seen, whether or not its id is known; 0.0 at the first call."""
        return self._clock() - self._absence(attempt).since

    def _ask_about(self, unlisted: Iterable[tuple[str, JobAttempt]]) -> None:
        due = [(job_id, attempt) for job_id, attempt in unlisted if self._is_due(attempt)]
        past = self._slurm.history({job_id for job_id, _ in due})
        for job_id, attempt in due:
            try:
                state = self._ask(job_id, attempt, past.get(job_id))
            except SlurmUnavailableError:
                continue
            self._states[attempt.folder] = state
            if state.job is not None:
                self.jobs.setdefault(job_id, state.job)
                self._absences.pop(attempt.folder, None)

    def _is_due(self, attempt: JobAttempt) -> bool:
        """Return whether to ask the controller about a job now, which happens once in ``ASK_AGAIN_S``."""
        absence, now = self._absence(attempt), self._clock()
        if absence.asked is not None and now - absence.asked < ASK_AGAIN_S:
            return False
        absence.asked = now
        return True

    def _ask(self, job_id: str, attempt: JobAttempt, past: JobInfo | None) -> JobState:
        # Ids are reused if a cluster was set up anew, names are not.
        job, name = self._slurm.job(job_id), attempt.intent.job_name
        if job is not None and job.name == name:
            return JobState(job)
        # Only after the controller: accounting may still show the end of a start after which the job was requeued.
        if past is not None and past.name == name and not past.is_live:
            return JobState(past)
        is_gone = _said_that_it_ended(attempt) or self.missing_for(attempt) >= GONE_AFTER_S
        return GONE_STATE if is_gone else UNKNOWN

    def _absence(self, attempt: JobAttempt) -> _Absence:
        """Return since when a job is missing; each sign of life in the store resets it."""
        signs = self._signs_of_life(attempt)
        absence = self._absences.get(attempt.folder)
        if absence is None or absence.signs != signs:
            absence = _Absence(self._clock(), signs, None if absence is None else absence.asked)
            self._absences[attempt.folder] = absence
        return absence

    def _signs_of_life(self, attempt: JobAttempt) -> Any:
        return self._store.handle(attempt.intent.stage_id).heartbeat(), attempt.runs()


def _said_that_it_ended(attempt: JobAttempt) -> bool:
    """Return whether a job's last start recorded an end after which the job is not requeued."""
    runs = attempt.runs()
    return bool(runs) and runs[-1].how in ("done", "failed", "duplicate")


def inputs_of_live_jobs(store: Store) -> Mapping[str, list[str]]:
    """Id of each stage whose job may wait or run -> ids of the stages whose artifacts it reads, which must stay."""
    submitted = {attempt.intent.stage_id for attempt in _attempts_that_go_on(store)}
    return {stage_id: _read_by(store, stage_id) for stage_id in sorted(submitted)}


def _attempts_that_go_on(store: Store) -> list[JobAttempt]:
    """Open attempts at any stage, except those whose jobs are over as Slurm says; all of them if it doesn't answer."""
    attempts = Attempts(store.root).open_attempts()
    if not attempts:
        return []
    tracker = JobTracker(store, SlurmCommands(retry_delays_s=()), time.monotonic)
    try:
        tracker.look(with_job_ids(attempts))
    except SlurmUnavailableError:
        return attempts
    return [attempt for attempt in attempts if not tracker.state_of(attempt).is_over]


def _read_by(store: Store, stage_id: str) -> list[str]:
    """Ids of the stages that a submitted one reads; none if its file is lost, without which its job can't run."""
    content = find_stage_file(store.handle(stage_id))
    inputs = {} if content is None else content.stage.get("inputs", {})
    return [source["location"] for source in inputs.values() if source.get("is_stage")]
