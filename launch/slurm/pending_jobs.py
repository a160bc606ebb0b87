"""Reasons why jobs wait: which to report to the user and when, and which jobs will never start by themselves."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from hfprune_launch.slurm.causes import Cause
from hfprune_launch.slurm.job_info import DEPENDENCY, NEVER, JobInfo

from hfprune_dist.results.formats import counted

# A node could not launch the job, once or more often than the cluster allows ("launch failure limit exceeded requeued
# held"), or could not read the user's environment: Slurm holds it for ever, even after the node has been repaired.
LAUNCH_FAILED = re.compile(r"requeued.held|JobHoldMaxRequeue", re.IGNORECASE)
HELD = ("JobHeldUser", "JobHeldAdmin", "job requeued in held state", "job requeued in special exit state")
# Reasons that occur in every queue, of interest only if the wait is long.
ORDINARY = ("None", "Priority", "Resources", "BeginTime", "Prolog", "Cleaning")
LONG_WAIT_S = 300.0
# kill-on-invalid-dep ends a job whose dependency failed; if it hasn't after this time, it does not work.
STUCK_S = 60.0
# Seconds after which what still keeps the sweep waiting is told again.
REMIND_S = 3600.0
NAMED_JOBS = 3


class PendingJobs:
    """Remembers the reasons for which jobs wait, and since when.

    Args:
        tell: called with one line per reason.
        clock: seconds of a monotonic clock.
    """

    def __init__(self, tell: Callable[[str], None], clock: Callable[[], float]) -> None:
        self._tell = tell
        self._clock = clock
        self._since: dict[str, float] = {}
        self._told: dict[str, float] = {}
        self._stuck_since: dict[str, float] = {}

    def note(self, jobs: Sequence[JobInfo]) -> None:
        """Report new reasons for which jobs of the sweep wait, and those that last."""
        now = self._clock()
        waiting: dict[str, list[str]] = {}
        for job in jobs:
            if job.is_waiting and job.reason != DEPENDENCY:
                waiting.setdefault(_short(job.reason), []).append(job.job_id)
        self._since = {reason: self._since.get(reason, now) for reason in waiting}
        for reason, job_ids in waiting.items():
            lasted = now - self._since[reason]
            is_due = reason not in self._told or now - self._told[reason] >= REMIND_S
            if is_due and (reason not in ORDINARY or lasted >= LONG_WAIT_S):
                self._told[reason] = now
                self._tell(_sentence(reason, job_ids, lasted))

    def hopeless(self, job: JobInfo) -> Cause | None:
        """Return the cause for giving up a job that will never start by itself; None if it may start."""
        if not job.is_waiting:
            return None
        if LAUNCH_FAILED.search(job.reason):
            return Cause.BAD_NODE
        if job.reason != NEVER:
            self._stuck_since.pop(job.job_id, None)
            return None
        since = self._stuck_since.setdefault(job.job_id, self._clock())
        return Cause.NOT_RUN if self._clock() - since >= STUCK_S else None


def _short(reason: str) -> str:
    """Return a reason without the nodes that Slurm may list after it."""
    return re.split(r"[,_ (]*Unavailable\w*:", reason)[0]


def _sentence(reason: str, job_ids: Sequence[str], lasted: float) -> str:
    named = ", ".join(job_ids[:NAMED_JOBS]) + (", ..." if len(job_ids) > NAMED_JOBS else "")
    time = f" for {lasted / 60:.0f} min" if lasted >= 60 else ""
    release = "; scontrol release frees a held job" if reason in HELD else ""
    return f"{counted(len(job_ids), 'job')} can't start{time}: {reason} ({named}){release}"
