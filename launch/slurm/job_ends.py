"""The ends of a sweep's jobs: jobs are found, attempts are closed with a cause, hopeless jobs are given up."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

from hfprune_launch.slurm.attempt_records import GONE, SCRIPT, End
from hfprune_launch.slurm.attempts import JobAttempt
from hfprune_launch.slurm.causes import RETRIES, Cause
from hfprune_launch.slurm.exit_causes import explain_end
from hfprune_launch.slurm.job_info import JobInfo
from hfprune_launch.slurm.job_tracker import GONE_AFTER_S, JobState
from hfprune_launch.slurm.pending_jobs import PendingJobs
from hfprune_launch.slurm.sweep_jobs import Event, SweepJobs

from hfprune_dist.store.claims import Holder
from hfprune_dist.store.heartbeat import Failure
from hfprune_dist.store.stage import Stage

# Time after a job's completion by which its artifact has to be visible here (file systems lag).
LAG_S = 60.0
# Causes in another stage or outside, for which the stage itself has no failure to report.
NO_FAILURE = (Cause.NOT_RUN, Cause.NOT_ACCEPTED)


class JobEnds:
    """Follows the jobs of a sweep to their ends."""

    def __init__(self, jobs: SweepJobs) -> None:
        self._jobs = jobs
        self._pending = PendingJobs(lambda message: jobs.tell(Event("waiting", None, None, message)), jobs.clock)
        # Causes of the attempts that ended while this launcher watched; those that ended earlier no longer count.
        self._ended: dict[str, list[str]] = {}
        self._completed_since: dict[str, float] = {}
        # Stage id -> why we cancelled its job, which would never have started.
        self._given_up: dict[str, End] = {}
        # Names of jobs that were missing when this launcher started: they count as having ended before that.
        self._inherited: set[str] = set()

    def take_up_earlier(self) -> None:
        """Take over what earlier launchers left; none of it counts as tried by this one."""
        self._close_finished()
        self.take_up()
        self._ended.clear()
        live = self._jobs.live.values()
        self._inherited = {attempt.intent.job_name for attempt in live if self._jobs.tracker.is_missing(attempt)}

    def _close_finished(self) -> None:
        """Record the ends of jobs that have made their artifacts while no launcher was there."""
        jobs = self._jobs
        for stage in (it for it in jobs.plan.stages.values() if it.id not in jobs.todo):
            attempt = jobs.handle(stage.id).open_attempt()
            if attempt is not None and (((runs := attempt.runs()) and runs[-1].ended) or attempt.exit_record()):
                attempt.close(explain_end(jobs.store, stage, attempt, None))

    def take_up(self) -> None:
        """Look up the states of all jobs, and close the attempts whose jobs are over."""
        jobs = self._jobs
        # Records of attempts are read before squeue, so that a recorded job is either in squeue or over.
        for stage_id in (it for it in jobs.plan.stages if it in jobs.todo and it not in jobs.live):
            if attempt := jobs.handle(stage_id).open_attempt():
                jobs.live[stage_id] = attempt
        job_ids = {stage_id: attempt.job_id for stage_id, attempt in jobs.live.items()}
        jobs.tracker.look([(job_id, jobs.live[stage_id]) for stage_id, job_id in job_ids.items() if job_id is not None])
        states = {stage_id: jobs.tracker.state_of(jobs.live[stage_id]) for stage_id in job_ids}
        self._pending.note([state.job for state in states.values() if state.job is not None])
        for stage_id, attempt in list(jobs.live.items()):
            if job_ids[stage_id] is None:
                self._find(attempt)
            else:
                self._close_if_over(attempt, states[stage_id])

    def may_try(self, stage: Stage) -> bool:
        """Return whether a stage may be tried again, given all of its ends that this launcher saw."""
        ended = Counter(self._ended.get(stage.id, []))
        return all(count <= RETRIES.get(cause, 0) for cause, count in ended.items())

    def close(self, stage: Stage, attempt: JobAttempt, end: End) -> None:
        """Record how an attempt ended, for the next launcher and the report."""
        jobs = self._jobs
        attempt.close(end)
        jobs.live.pop(stage.id, None)
        self._completed_since.pop(stage.id, None)
        jobs.without_id.discard(stage.id)
        if end.cause == Cause.DONE:
            jobs.todo.discard(stage.id)
            jobs.handle(stage.id).discard_work()  # for a job that died between its commit and its end
            jobs.tell(Event("done", stage, attempt.job_id, f"{end.run_seconds:.0f} s"))
            return
        if attempt.intent.job_name not in self._inherited:
            self._ended.setdefault(stage.id, []).append(end.cause)
        self._report_failure(stage, attempt, end)
        jobs.todo |= {*jobs.plan.lacking_for(stage.needs, lambda stage_id: jobs.handle(stage_id).is_done())}
        if (
            end.cause != Cause.NOT_ACCEPTED
        ):  # the submission, which is tried again every few seconds, tells of them once
            jobs.tell(Event("ended", stage, attempt.job_id, f"{end.cause}: {end.message}"))

    def _report_failure(self, stage: Stage, attempt: JobAttempt, end: End) -> None:
        """Leave the cause for the report, instead of what the ranks said as they died."""
        handle = self._jobs.handle(stage.id)
        handle.work.mkdir(parents=True, exist_ok=True)
        handle.clear_failures()
        if end.cause not in NO_FAILURE:
            handle.report_failure(Failure(end.cause, end.message, -1, end.at, attempt.intent.number))

    # Jobs whose ids are unknown.

    def _find(self, attempt: JobAttempt) -> None:
        """Find the job of an intent whose launcher died before it wrote the job's id, or is about to write it."""
        job = self._jobs.tracker.named(attempt.intent.job_name)
        job_id = None if job is None else job.job_id
        if job_id is None:
            job_id = self._find_claimed(attempt)
        if job_id is not None:
            attempt.record_job(job_id)
            self._jobs.tell(Event("adopted", self._jobs.stage_of(attempt), job_id))

    def _find_claimed(self, attempt: JobAttempt) -> str | None:
        """Look a second time and return the job's id; if there certainly is none, close the attempt."""
        stage, name = self._jobs.stage_of(attempt), attempt.intent.job_name
        # Only the claim's holder may decide that a submission came to nothing: its launcher may still be submitting.
        claim = self._jobs.handle(stage.id).claim()
        if isinstance(claim, Holder):
            return None
        try:
            recorded = attempt.job_id  # before squeue, as in take_up
            found = self._jobs.slurm.find(name)
            if found is None and recorded is None and self._came_to_nothing(attempt):
                self.close(stage, attempt, End(Cause.NOT_RUN, "the launcher died while it submitted", time.time()))
        finally:
            claim.release()
        return found

    def _came_to_nothing(self, attempt: JobAttempt) -> bool:
        """Return whether an intent certainly has no job; that squeue does not list one is not enough."""
        jobs = self._jobs
        if not (attempt.folder / SCRIPT).exists():
            return True  # the launcher died before sbatch
        if attempt.intent.stage_id in jobs.without_id and jobs.tracker.missing_for(attempt) < GONE_AFTER_S:
            return False
        jobs.slurm.cancel_named(attempt.intent.job_name)
        return True

    # Jobs with known ids.

    def _close_if_over(self, attempt: JobAttempt, state: JobState) -> None:
        stage, job = self._jobs.stage_of(attempt), state.job
        if job is not None and job.is_live:
            self._give_up_hopeless(stage, job)
        elif job is not None or self._jobs.handle(stage.id).is_done():
            end = self._end(stage, attempt, job)
            if not self._may_lag(stage, job, end):
                self.close(stage, attempt, end)
        elif state.is_gone:
            self._close_gone(stage, attempt)
        else:
            self._tell_of_missing(stage, attempt)

    def _may_lag(self, stage: Stage, job: JobInfo | None, end: End) -> bool:
        """Return whether the artifact of a completed job may still become visible here."""
        if job is None or job.state != "COMPLETED" or end.cause == Cause.DONE:
            return False
        now = self._jobs.clock()
        return now - self._completed_since.setdefault(stage.id, now) < LAG_S

    def _close_gone(self, stage: Stage, attempt: JobAttempt) -> None:
        """Close an attempt whose job is no longer known anywhere, unless its claim shows that it lives."""
        claim = self._jobs.handle(stage.id).claim()
        if isinstance(claim, Holder):
            self._tell_of_missing(stage, attempt)
            return
        try:
            end = self._end(stage, attempt, None)
            self.close(stage, attempt, end if end.state else replace(end, state=GONE))
        finally:
            claim.release()

    def _end(self, stage: Stage, attempt: JobAttempt, job: JobInfo | None) -> End:
        end = explain_end(self._jobs.store, stage, attempt, job)
        given_up = self._given_up.pop(stage.id, None)
        if given_up is None or end.cause == Cause.DONE:
            return end
        return replace(end, cause=given_up.cause, message=given_up.message, bad_nodes=given_up.bad_nodes)

    def _tell_of_missing(self, stage: Stage, attempt: JobAttempt) -> None:
        minutes = f"{GONE_AFTER_S / 60:.0f} min"
        message = f"Slurm says nothing of it; it counts as gone after {minutes} without a sign of life"
        self._jobs.tell(Event("waiting", stage, attempt.job_id, message))

    # Jobs that Slurm will never start.

    def _give_up_hopeless(self, stage: Stage, job: JobInfo) -> None:
        """Cancel a job that Slurm will never start; the next round finds it ended, and tries again."""
        cause = self._pending.hopeless(job)
        if cause is None:
            return
        if stage.id not in self._given_up:
            self._given_up[stage.id] = self._given_up_for(cause, job)
        self._jobs.slurm.cancel([job.job_id])

    def _given_up_for(self, cause: Cause, job: JobInfo) -> End:
        nodes = self._jobs.slurm.launched_on(job.job_id) if cause == Cause.BAD_NODE else ""
        where = f" on {nodes}" if nodes else ""
        message = f"job {job.job_id} could not be started{where} and would have waited for ever: {job.reason}"
        is_one = bool(nodes) and not {"[", ","} & set(nodes)
        return End(cause, message, time.time(), bad_nodes=[nodes] if is_one else [])
