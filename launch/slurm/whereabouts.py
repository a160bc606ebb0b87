"""What has become of the jobs of open attempts, as far as squeue, the controller or accounting know.

squeue lists a user's jobs. That it does not list one says nothing yet: its answer may be cut short between two lines,
the job may be another user's or another cluster's, or have ended long ago. So the controller is asked about it
(scontrol), and where it knows no such job, accounting (sacct). A job that none of them knows counts as gone after some
minutes in which nothing in the store shows that it lives.
"""

from __future__ import annotations

import getpass
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune_launch.slurm.attempts import Attempt
from hfprune_launch.slurm.commands import JobInfo, SlurmCommands, SlurmUnavailableError

from hfprune_dist.store.artifacts import Store

# So long a job must have been unknown, without a sign of life, before it counts as gone.
GONE_AFTER_S = 180.0
# How often the controller is asked about a job that squeue does not list.
ASK_AGAIN_S = 60.0


@dataclass(frozen=True)
class Sighting:
    """What is known about an attempt's job.

    Attributes:
        job: what Slurm says about it; None: nothing.
        is_gone: whether the job counts as over although Slurm says nothing about it, unless somebody holds the stage's
            claim. Where it is False and ``job`` is None, the job may be running.
    """

    job: JobInfo | None
    is_gone: bool = False


UNKNOWN = Sighting(None)
GONE_SIGHTING = Sighting(None, is_gone=True)


@dataclass
class _Absence:
    """Since when squeue has not listed a job, and the signs of life in the store then. Times are those of the clock."""

    since: float
    signs: object
    asked: float | None = None


class Whereabouts:
    """Looks for jobs, and remembers since when each missing one has been missing.

    Args:
        clock: seconds that only grow.
    """

    def __init__(self, store: Store, slurm: SlurmCommands, clock: Callable[[], float]) -> None:
        self._store = store
        self._slurm = slurm
        self._clock = clock
        self._user = getpass.getuser()
        self._absences: dict[Path, _Absence] = {}
        self._sightings: dict[Path, Sighting] = {}
        self.jobs: dict[str, JobInfo] = {}

    @property
    def me(self) -> dict[str, str]:
        """Cluster and user of the jobs that are submitted from here."""
        return {"cluster": self._slurm.cluster(), "user": self._user}

    def look(self, attempts: Mapping[str, Attempt]) -> None:
        """Ask Slurm about all jobs.

        Args:
            attempts: open attempts, by job id.

        Raises:
            SlurmUnavailableError: where squeue did not answer.
        """
        self.jobs = self._slurm.jobs()
        by_name = {job.name: job for job in sorted(self.jobs.values(), key=lambda job: job.is_live)}
        self._sightings = {}
        unlisted = {}
        for job_id, attempt in attempts.items():
            job = by_name.get(attempt.intent.job_name, self.jobs.get(job_id))
            if job is not None and _is_named(job, attempt):
                self._absences.pop(attempt.folder, None)
                self._sightings[attempt.folder] = Sighting(job)
            else:
                unlisted[job_id] = attempt
        self._ask_about(unlisted)

    def named(self, job_name: str) -> JobInfo | None:
        """The job that squeue lists under a name; a live one, where there are several."""
        found = [job for job in self.jobs.values() if job.name == job_name]
        return max(found, key=lambda job: job.is_live, default=None)

    def sighting(self, attempt: Attempt) -> Sighting:
        """What the last look showed."""
        return self._sightings.get(attempt.folder, UNKNOWN)

    def is_missing(self, attempt: Attempt) -> bool:
        """Whether nobody in Slurm could say anything about a job."""
        return attempt.folder in self._absences

    def is_elsewhere(self, attempt: Attempt) -> bool:
        """Whether a job is another cluster's, about which Slurm can say nothing here."""
        return bool(attempt.intent.cluster) and attempt.intent.cluster != self._slurm.cluster()

    def is_somebody_elses(self, attempt: Attempt) -> bool:
        """Whether a job is another user's, which squeue does not list and scontrol may hide."""
        return attempt.intent.user not in ("", self._user)

    def missing_for(self, attempt: Attempt) -> float:
        """For how many seconds a job has not been seen, whether or not its id is known; 0.0 at the first call."""
        return self._clock() - self._absence(attempt).since

    def _ask_about(self, unlisted: Mapping[str, Attempt]) -> None:
        due = {job_id: attempt for job_id, attempt in unlisted.items() if self._is_due(attempt)}
        past = self._slurm.history(due)
        for job_id, attempt in due.items():
            try:
                sighting = self._ask(job_id, attempt, past.get(job_id))
            except SlurmUnavailableError:
                continue
            self._sightings[attempt.folder] = sighting
            if sighting.job is not None:
                self.jobs[job_id] = sighting.job
                self._absences.pop(attempt.folder, None)

    def _is_due(self, attempt: Attempt) -> bool:
        """Whether it is time to ask the controller about a job, which happens once in ``ASK_AGAIN_S``."""
        absence = self._absence(attempt)
        if self.is_elsewhere(attempt):
            return False
        now = self._clock()
        if absence.asked is not None and now - absence.asked < ASK_AGAIN_S:
            return False
        absence.asked = now
        return True

    def _ask(self, job_id: str, attempt: Attempt, past: JobInfo | None) -> Sighting:
        job = self._slurm.job(job_id)
        if job is not None and _is_named(job, attempt):  # ids come again where a cluster was set up anew
            return Sighting(job)
        # Only now: accounting may still show the end of a start after which the job was requeued.
        if past is not None and _is_named(past, attempt) and not past.is_live:
            return Sighting(past)
        if self.is_somebody_elses(attempt):
            return UNKNOWN
        if _said_that_it_ended(attempt):
            return GONE_SIGHTING
        return GONE_SIGHTING if self.missing_for(attempt) >= GONE_AFTER_S else UNKNOWN

    def _absence(self, attempt: Attempt) -> _Absence:
        """Since when a job is missing; counted anew from each sign of life in the store."""
        signs = self._signs_of_life(attempt)
        absence = self._absences.get(attempt.folder)
        if absence is None or absence.signs != signs:
            absence = _Absence(self._clock(), signs, asked=absence.asked if absence is not None else None)
            self._absences[attempt.folder] = absence
        return absence

    def _signs_of_life(self, attempt: Attempt) -> Any:
        return self._store.handle(attempt.intent.stage_id).heartbeat(), attempt.runs()


def _is_named(job: JobInfo, attempt: Attempt) -> bool:
    """Whether a job has an attempt's name. Damaged records may have lost its end, so that its beginning decides."""
    return job.name.startswith(attempt.intent.job_name)


def _said_that_it_ended(attempt: Attempt) -> bool:
    """Whether the last start of a job recorded that it ended in a way after which the job is not requeued."""
    runs = attempt.runs()
    return bool(runs) and runs[-1].how in ("done", "failed", "duplicate")
