"""Cancellation of a sweep: all jobs of its store, whichever launcher submitted them, in today's plan or not."""

from __future__ import annotations

import time
from collections.abc import Callable

from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.slurm.observe import Observer

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Attempt, Ledger

# Seconds between two looks for jobs, and for which jobs and launchers that submit at this moment are waited for.
LOOK_AGAIN_S = 2.0
PATIENCE_S = 60.0


def cancel_jobs(
    store: Store, slurm: SlurmCommands, sleep: Callable[[float], object] = time.sleep
) -> tuple[list[str], list[str]]:
    """Cancel the jobs of all open attempts, and look again until there are none: a launcher may be submitting one at
    this moment, or a job may just have put itself back into the queue.

    Returns:
        the ids of the cancelled jobs, and what still runs, or may be submitted, after some time.

    Raises:
        SlurmUnavailableError: if Slurm did not answer; some jobs may be left.
    """
    ledger = Ledger(store)
    observer = Observer(ledger, slurm)
    cancelled: set[str] = set()
    asked: set[str] = set()
    for _ in range(int(PATIENCE_S / LOOK_AGAIN_S)):
        attempts = ledger.open_jobs()
        submitting = _submitting(ledger, attempts)
        observer.look(attempts)
        jobs = {attempt.intent.job_name: observer.jobs.get(attempt.intent.job_name) for attempt in attempts}
        found = [job for job in jobs.values() if job is not None and job.is_live and job.state != "COMPLETING"]
        # Pending jobs come first: they would start when the jobs that they wait for are gone.
        found.sort(key=lambda job: (not job.is_waiting, int(job.job_id)))
        slurm.cancel([job.job_id for job in found])
        cancelled |= {job.job_id for job in found}
        for name in {name for name, job in jobs.items() if job is None} - asked:
            slurm.cancel_named(name)  # squeue may have missed it
        asked |= jobs.keys()
        if not found and not submitting:
            break
        sleep(LOOK_AGAIN_S)
    return sorted(cancelled, key=int), [*submitting, *(f"job {job.job_id}" for job in found)]


def _submitting(ledger: Ledger, attempts: list[Attempt]) -> list[str]:
    """Return the launchers that may be submitting jobs at this moment: they hold claims, and have recorded no id."""
    handles = (ledger.store.handle(attempt.intent.stage_id) for attempt in attempts if attempt.job_id is None)
    holders = {handle.holder() for handle in handles}
    launchers = {holder for holder in holders if holder is not None and holder.lives and holder.job is None}
    return sorted(f"{launcher} submits a job" for launcher in launchers)
