"""The states of open attempts' jobs, as far as squeue, the controller or accounting know them.

squeue lists a user's jobs. A job's absence from that list says nothing yet: the answer may be cut short between two
lines, or the job may be another user's or cluster's, or have ended long ago. So the controller is asked about it
(scontrol), and if it knows no such job, accounting (sacct). A job that none of them knows counts as gone after some
minutes in which nothing in the store shows that it lives.

In a federation, a job has a copy of the same id on each cluster. Where another cluster takes it, the copy here is
REVOKED, and says neither whether the job waits or runs there, nor afterwards, for a while, that it is over. So such a
job counts as gone only if one of its starts has stopped showing that it lives.
"""

from __future__ import annotations

import getpass
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hfprune_launch.slurm.attempts import JobAttempt
from hfprune_launch.slurm.commands import SlurmCommands, SlurmUnavailableError
from hfprune_launch.slurm.job_info import JobInfo

from hfprune_dist.store.artifacts import Store

# Seconds for which a job must have been unknown, without a sign of life, before it counts as gone.
GONE_AFTER_S = 180.0
# Seconds between two questions to the controller about a job that squeue does not list.
ASK_AGAIN_S = 60.0
REVOKED = "REVOKED"


@dataclass(frozen=True)
class Sighting:
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


UNKNOWN = Sighting(None)
GONE_SIGHTING = Sighting(None, is_gone=True)


@dataclass
class _Absence:
    """The time since which squeue has not listed a job, and the store's signs of life then. Times are of the clock.

    ``is_revoked``: whether another cluster had taken it when the controller was last asked.
    """

    since: float
    signs: object
    asked: float | None = None
    is_revoked: bool = False


class Whereabouts:
    """Looks for jobs, and remembers since when each missing one has been missing.

    Args:
        clock: seconds of a monotonic clock.
    """

    def __init__(self, store: Store, slurm: SlurmCommands, clock: Callable[[], float]) -> None:
        self._store = store
        self._slurm = slurm
        self._clock = clock
        self._user = _own_name()
        self._absences: dict[Path, _Absence] = {}
        self._sightings: dict[Path, Sighting] = {}
        self.jobs: dict[str, JobInfo] = {}

    @property
    def me(self) -> dict[str, str]:
        """Cluster and user of the jobs that are submitted from here."""
        return {"cluster": self._slurm.cluster(), "user": self._user}

    def look(self, attempts: Iterable[tuple[str, JobAttempt]]) -> None:
        """Ask Slurm about all jobs.

        Args:
            attempts: job ids and their open attempts; several have one id if a cluster that was set up anew reuses it.

        Raises:
            SlurmUnavailableError: if squeue did not answer.
        """
        self.jobs = self._slurm.jobs()
        by_name = {job.name: job for job in sorted(self.jobs.values(), key=lambda job: job.is_live)}
        self._sightings = {}
        unlisted = []
        for job_id, attempt in attempts:
            job = by_name.get(attempt.intent.job_name, self.jobs.get(job_id))
            if job is not None and is_named(job, attempt) and job.state != REVOKED:
                self._absences.pop(attempt.folder, None)
                self._sightings[attempt.folder] = Sighting(job)
            else:
                unlisted.append((job_id, attempt))
        self._ask_about(unlisted)

    def named(self, job_name: str) -> JobInfo | None:
        """Return the job that squeue lists under a name; a live one if there are several."""
        found = [job for job in self.jobs.values() if job.name == job_name]
        return max(found, key=lambda job: job.is_live, default=None)

    def sighting(self, attempt: JobAttempt) -> Sighting:
        """Return what the last look showed about an attempt's job."""
        return self._sightings.get(attempt.folder, UNKNOWN)

    def is_missing(self, attempt: JobAttempt) -> bool:
        """Return whether nothing in Slurm knew a job."""
        return attempt.folder in self._absences

    def is_revoked(self, attempt: JobAttempt) -> bool:
        """Return whether another cluster of a federation has taken a job."""
        absence = self._absences.get(attempt.folder)
        return absence is not None and absence.is_revoked

    def is_elsewhere(self, attempt: JobAttempt) -> bool:
        """Return whether a job is on another cluster, about which Slurm knows nothing here."""
        return bool(attempt.intent.cluster) and attempt.intent.cluster != self._slurm.cluster()

    def is_somebody_elses(self, attempt: JobAttempt) -> bool:
        """Return whether a job is another user's, which squeue does not list and scontrol may hide."""
        return attempt.intent.user not in ("", self._user)

    def is_out_of_sight(self, attempt: JobAttempt) -> bool:
        """Return whether Slurm says nothing of a job to this user here, who can't cancel it from here either."""
        return self.is_elsewhere(attempt) or self.is_somebody_elses(attempt)

    def missing_for(self, attempt: JobAttempt) -> float:
        """Return the seconds since a job was last seen, whether or not its id is known; 0.0 at the first call."""
        return self._clock() - self._absence(attempt).since

    def _ask_about(self, unlisted: Iterable[tuple[str, JobAttempt]]) -> None:
        due = [(job_id, attempt) for job_id, attempt in unlisted if self._is_due(attempt)]
        past = self._slurm.history({job_id for job_id, _ in due})
        for job_id, attempt in due:
            try:
                sighting = self._ask(job_id, attempt, past.get(job_id))
            except SlurmUnavailableError:
                continue
            self._sightings[attempt.folder] = sighting
            if sighting.job is not None:
                self.jobs.setdefault(job_id, sighting.job)
                self._absences.pop(attempt.folder, None)

    def _is_due(self, attempt: JobAttempt) -> bool:
        """Return whether to ask the controller about a job now, which happens once in ``ASK_AGAIN_S``."""
        absence = self._absence(attempt)
        if self.is_elsewhere(attempt):
            return False
        now = self._clock()
        if absence.asked is not None and now - absence.asked < ASK_AGAIN_S:
            return False
        absence.asked = now
        return True

    def _ask(self, job_id: str, attempt: JobAttempt, past: JobInfo | None) -> Sighting:
        job = self._slurm.job(job_id)
        is_known = job is not None and is_named(job, attempt)  # ids are reused if a cluster was set up anew
        absence = self._absence(attempt)
        absence.is_revoked = is_known and job is not None and job.state == REVOKED
        if is_known and not absence.is_revoked:
            return Sighting(job)
        # Only after the controller: accounting may still show the end of a start after which the job was requeued.
        if past is not None and is_named(past, attempt) and not past.is_live and past.state != REVOKED:
            return Sighting(past)
        if self.is_somebody_elses(attempt):
            return UNKNOWN
        if _said_that_it_ended(attempt):
            return GONE_SIGHTING
        if absence.is_revoked and not _is_under_way(attempt):
            return UNKNOWN
        return GONE_SIGHTING if self.missing_for(attempt) >= GONE_AFTER_S else UNKNOWN

    def _absence(self, attempt: JobAttempt) -> _Absence:
        """Return since when a job is missing; each sign of life in the store resets it."""
        signs = self._signs_of_life(attempt)
        absence = self._absences.get(attempt.folder)
        if absence is None or absence.signs != signs:
            before = _Absence(0.0, None) if absence is None else absence
            absence = _Absence(self._clock(), signs, before.asked, before.is_revoked)
            self._absences[attempt.folder] = absence
        return absence

    def _signs_of_life(self, attempt: JobAttempt) -> Any:
        return self._store.handle(attempt.intent.stage_id).heartbeat(), attempt.runs()


def _own_name() -> str:
    """Return the user's name, or number if it has no name, as in a container that runs as a user of its host."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):  # OSError from Python 3.13 on
        return str(os.getuid())


def is_named(job: JobInfo, attempt: JobAttempt) -> bool:
    """Return whether a job has an attempt's name. Only the beginning counts, as damaged records may lose the rest."""
    return job.name.startswith(attempt.intent.job_name)


def _said_that_it_ended(attempt: JobAttempt) -> bool:
    """Return whether a job's last start recorded an end after which the job is not requeued."""
    runs = attempt.runs()
    return bool(runs) and runs[-1].how in ("done", "failed", "duplicate")


def _is_under_way(attempt: JobAttempt) -> bool:
    """Return whether a job's last start recorded no end: it runs, or has died."""
    runs = attempt.runs()
    return bool(runs) and runs[-1].ended is None
