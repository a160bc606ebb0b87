"""What the store and Slurm say about a sweep's stages.

squeue lists a user's jobs. A job's absence from that list says nothing yet: the answer may be cut short between two
lines, or the job may have ended long ago. So accounting is asked about it, and it counts as gone after some minutes in
which nothing in the store shows that it lives, if the controller then says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from hfprune_launch.slurm.commands import JobInfo, SlurmCommands, SlurmUnavailableError
from hfprune_launch.slurm.decide import GONE_AFTER_S, Sight, StageState
from hfprune_launch.stage.stage_file import find_stage_file

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import DONE, Attempt, Ledger


class Observer:
    """Looks at Slurm and at the store.

    What it remembers can be seen again: since when what is seen of a job has not changed, and which artifacts it has
    verified.

    Args:
        clock: seconds of a monotonic clock.

    Attributes:
        jobs: by name, the jobs that the last look found.
    """

    def __init__(self, ledger: Ledger, slurm: SlurmCommands, clock: Callable[[], float] = time.monotonic) -> None:
        self._ledger = ledger
        self._slurm = slurm
        self._clock = clock
        self._since: dict[str, tuple[Any, float]] = {}
        self._verified: set[str] = set()
        self.jobs: dict[str, JobInfo] = {}

    def look(self, attempts: Iterable[Attempt]) -> None:
        """Ask Slurm about the jobs of open attempts.

        Read attempts from the ledger before calling this: then a job that is recorded and not listed is over.

        Raises:
            SlurmUnavailableError: if squeue did not answer.
        """
        asked = [(attempt.intent.job_name, attempt, attempt.job_id) for attempt in attempts]
        self.jobs = self._slurm.jobs()
        unlisted = {name: job_id for name, _, job_id in asked if job_id is not None and name not in self.jobs}
        # Ids are reused if a cluster was set up anew, names are not.
        past = self._slurm.history(unlisted.values())
        self.jobs |= {job.name: job for job in past if job.name in unlisted and not job.is_live}
        before, self._since = self._since, {}
        for name, attempt, job_id in asked:
            job = self.jobs.get(name)
            seen = (job.state, job.reason) if job is not None else self._signs_of_life(attempt)
            self._since[name] = before[name] if name in before and before[name][0] == seen else (seen, self._clock())
            if job is None and job_id is not None and self.lasts(attempt) >= GONE_AFTER_S:
                self._ask_the_controller(name, job_id)

    def _ask_the_controller(self, name: str, job_id: str) -> None:
        """Make sure that a job is gone; if it isn't, or that can't be known now, it has been missing since now."""
        try:
            job = self._slurm.job(job_id)
        except SlurmUnavailableError:
            self._since[name] = self._since[name][0], self._clock()
            return
        if job is not None and job.name == name:
            self.jobs[name] = job
            self._since[name] = (job.state, job.reason), self._clock()

    def _signs_of_life(self, attempt: Attempt) -> Any:
        return self._ledger.store.handle(attempt.intent.stage_id).heartbeat(), attempt.runs()

    def lasts(self, attempt: Attempt) -> float:
        """Return the seconds for which looks have found the same about an attempt's job."""
        return self._clock() - self._since.get(attempt.intent.job_name, (None, self._clock()))[1]

    def is_done(self, stage_id: str) -> bool:
        """Return whether a stage has a verified artifact; verifies each only once."""
        if stage_id not in self._verified and self._ledger.store.handle(stage_id).is_done():
            self._verified.add(stage_id)
        return stage_id in self._verified

    def forget_artifacts(self) -> None:
        """Verify all artifacts again: a stage may have found one of them damaged."""
        self._verified.clear()

    def states(self, plan: Plan, attempts_before: Mapping[str, int]) -> dict[str, StageState]:
        """Return the state of every stage, as the last look and the store show it, in plan order.

        Args:
            attempts_before: number of the last attempt at a stage that this command didn't see end.
        """
        wanted = set(plan.lacking(self.is_done))
        return {
            stage.id: self._state(stage.id, stage.needs, stage.id in wanted, attempts_before.get(stage.id, 0))
            for stage in plan.stages.values()
        }

    def _state(self, stage_id: str, needs: Iterable[str], is_wanted: bool, before: int) -> StageState:
        attempt = self._ledger.open_job(stage_id)
        if attempt is None:
            attempts = self._ledger.jobs_of(stage_id) if is_wanted else []
            ended = (it.end for it in attempts if it.intent.number > before)
            # One that was done and is wanted again has been found damaged, which is no failure of its own.
            ends = tuple(end.cause for end in ended if end is not None and end.cause != DONE)
            return StageState(stage_id, tuple(needs), is_wanted, self.is_done(stage_id), ends=ends)
        job, runs = self.jobs.get(attempt.intent.job_name), attempt.runs()
        return StageState(
            stage_id,
            tuple(needs),
            is_wanted,
            self.is_done(stage_id),
            sight=self._sight(attempt, job),
            has_id=attempt.job_id is not None,
            reason=job.reason if job is not None else "",
            lasts=self.lasts(attempt),
            said_end=bool(runs) and runs[-1].how in ("done", "failed", "duplicate"),
        )

    def _sight(self, attempt: Attempt, job: JobInfo | None) -> Sight:
        if job is not None:
            if job.is_live:
                return Sight.WAITS if job.is_waiting else Sight.RUNS
            return Sight.COMPLETED if job.state == "COMPLETED" else Sight.ENDED
        return Sight.INTENDED if attempt.job_id is None else Sight.MISSING


def inputs_of_live_jobs(store: Store) -> Mapping[str, list[str]]:
    """Id of each stage whose job may wait or run -> ids of the stages whose artifacts it reads, which must stay."""
    ledger = Ledger(store)
    attempts = [it for it in ledger.open_jobs() if not store.handle(it.intent.stage_id).is_committed()]
    observer = Observer(ledger, SlurmCommands(retry_delays_s=()))
    try:
        if attempts:
            observer.look(attempts)
    except SlurmUnavailableError:
        pass
    ended = {name for name, job in observer.jobs.items() if not job.is_live}
    submitted = {attempt.intent.stage_id for attempt in attempts if attempt.intent.job_name not in ended}
    return {stage_id: _read_by(store, stage_id) for stage_id in sorted(submitted)}


def _read_by(store: Store, stage_id: str) -> list[str]:
    """Ids of the stages that a submitted one reads; none if its file is lost, without which its job can't run."""
    content = find_stage_file(store.handle(stage_id))
    inputs = {} if content is None else content.stage.get("inputs", {})
    return [source["location"] for source in inputs.values() if source.get("is_stage")]
