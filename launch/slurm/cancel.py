"""Cancellation of a sweep: all jobs of its store, whichever launcher submitted them, in today's plan or not."""

from __future__ import annotations

import time
from dataclasses import dataclass

from hfprune_launch.slurm.attempts import Attempts, JobAttempt, with_job_ids
from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.slurm.whereabouts import REVOKED, Whereabouts

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store


@dataclass(frozen=True)
class Cancelled:
    """The outcome of cancelling a sweep.

    Attributes:
        outside: stages of cancelled jobs that are not in the plan, from an edited configuration or an earlier version.
        foreign: open attempts of other users or clusters, which can't be cancelled from here.
    """

    job_ids: list[str]
    outside: list[str]
    foreign: list[JobAttempt]


def cancel_jobs(plan: Plan, store: Store, slurm: SlurmCommands) -> Cancelled:
    """Cancel the jobs of all open attempts.

    Raises:
        SlurmUnavailableError: if Slurm did not answer; some jobs may be left.
    """
    attempts = Attempts(store.root).open_attempts()
    whereabouts = Whereabouts(store, slurm, time.monotonic)
    whereabouts.look(with_job_ids(attempts))
    foreign = [attempt for attempt in attempts if whereabouts.is_out_of_sight(attempt)]
    stages = {attempt.intent.job_name: attempt.intent.stage_id for attempt in attempts if attempt not in foreign}
    # Pending jobs come first: they would start when the jobs that they wait for are gone.
    # A job that another cluster has taken is cancelled there by way of its copy here.
    goes_on = (job for job in whereabouts.jobs.values() if job.is_live or job.state == REVOKED)
    found = [job for job in goes_on if job.name in stages]
    found.sort(key=lambda job: (not job.is_waiting, int(job.job_id)))
    slurm.cancel([job.job_id for job in found])
    for name in stages.keys() - {job.name for job in whereabouts.jobs.values()}:
        slurm.cancel_named(name)  # squeue may have missed it
    outside = sorted({stages[job.name] for job in found} - plan.stages.keys())
    return Cancelled([job.job_id for job in found], outside, foreign)
