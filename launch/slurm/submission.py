"""Submission of a sweep's jobs: every missing stage whose inputs exist or are being made."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from hfprune_launch.slurm.attempt_records import End
from hfprune_launch.slurm.attempts import Attempts, JobAttempt
from hfprune_launch.slurm.batch_script import Request, default_threads, is_as_submitted, write_submission
from hfprune_launch.slurm.causes import Cause
from hfprune_launch.slurm.commands import (
    NeedEndedError,
    SlurmUnavailableError,
    SubmissionRefusedError,
    SubmitLimitError,
)
from hfprune_launch.slurm.exit_causes import nodes_to_avoid
from hfprune_launch.slurm.job_ends import JobEnds
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.slots import choose_slot
from hfprune_launch.slurm.sweep_jobs import Event, SweepJobs
from hfprune_launch.stage.stage_file import Provenance, write_stage_file

from hfprune_dist.store.atomic_files import fsync_folders
from hfprune_dist.store.cancellation import Cancellation
from hfprune_dist.store.claims import Holder, keep_renewed
from hfprune_dist.store.stage import Stage


@dataclass(frozen=True)
class Submitting:
    """Settings for new jobs.

    Attributes:
        snapshot: folder of the code that jobs run.
        max_running: the most jobs of the sweep that run at once; None for no limit.
        cancellation: tells whether jobs are still wanted.
    """

    provenance: Provenance
    profile: Profile
    snapshot: Path
    max_running: int | None
    cancellation: Cancellation


class SweepCancelledError(Exception):
    """Another command has cancelled the sweep since this launcher was started."""


class Submission:
    """Submits missing stages.

    Attributes:
        is_held_up: whether the last round left out a stage that could be submitted and has to be tried again.
    """

    def __init__(self, jobs: SweepJobs, ends: JobEnds, submitting: Submitting) -> None:
        self._jobs = jobs
        self._ends = ends
        self._submitting = submitting
        self._attempts = Attempts(jobs.store.root)
        self._outside: list[JobAttempt] | None = None
        self._is_told_of_cancellation = False
        self.is_held_up = False

    def submit_missing(self) -> None:
        """Submit every missing stage whose inputs exist or are being made, in plan order; nothing once cancelled."""
        self.is_held_up, self._outside = False, None
        try:
            with self._alone():
                self._require_wanted()
                self._submit_in_order()
        except SweepCancelledError:
            self.is_held_up = False
            if not self._is_told_of_cancellation and self.missing():
                message = "by another command, so nothing more is submitted; run the same command again to go on"
                self._jobs.tell(Event("cancelled", None, None, message))
                self._is_told_of_cancellation = True

    def missing(self) -> list[Stage]:
        """Return missing stages without a job."""
        without_job = self._jobs.todo - self._jobs.live.keys()
        return [stage for stage in self._jobs.plan.stages.values() if stage.id in without_job]

    def _require_wanted(self) -> None:
        if self._submitting.cancellation.is_requested():
            raise SweepCancelledError

    def _alone(self) -> AbstractContextManager[None]:
        """Under a limit, keep other launchers from taking slots that this one is about to find free."""
        may_submit = bool(self._jobs.todo - self._jobs.live.keys())
        return self._attempts.locked() if may_submit and self._submitting.max_running is not None else nullcontext()

    def _submit_in_order(self) -> None:
        for stage in self._jobs.plan.stages.values():
            try:
                self._submit_patiently(stage)
            except NeedEndedError as error:
                self.is_held_up = True
                self._jobs.tell(Event("waiting", stage, None, f"{error}; tried again"))
            except SubmitLimitError as error:
                self.is_held_up = True
                self._jobs.tell(Event("waiting", stage, None, f"{error}; {self._way_below_the_limit()}"))
                return

    def _way_below_the_limit(self) -> str:
        """Return how room for more jobs can come about, for messages."""
        if self._jobs.live or any(job.is_live for job in self._jobs.tracker.jobs.values()):
            return "the rest is submitted when jobs have ended"
        return (
            "none of your jobs is in the queue, so the limit allows none, or other users' jobs reach it; if this "
            "lasts, name another account, qos or partition in the profile"
        )

    def tell_of_outdated(self) -> None:
        """Report queued jobs that were submitted with another profile, or another limit, than this launcher's."""
        count = sum(self._is_outdated(attempt) for attempt in self._jobs.live.values())
        if count:
            message = (
                f"{'1 queued job keeps' if count == 1 else f'{count} queued jobs keep'} to the profile or the "
                "--max-running of an earlier command; --cancel, then the same command, submits with those of now"
            )
            self._jobs.tell(Event("waiting", None, None, message))

    def _is_outdated(self, attempt: JobAttempt) -> bool:
        job = self._jobs.tracker.state_of(attempt).job
        if job is None or not job.is_waiting:
            return False
        slot, limit = attempt.intent.slot, self._submitting.max_running
        keeps_limit = slot is None if limit is None else slot is not None and slot < limit
        request = self._request(self._jobs.stage_of(attempt), attempt, (), None)
        requests = request, replace(request, exclude=())  # either may be what Slurm accepted
        return not (keeps_limit and any(is_as_submitted(it) for it in requests))

    def _submit_patiently(self, stage: Stage) -> None:
        try:
            self._submit_if_possible(stage)
        except NeedEndedError:
            # A long submission can outlast Slurm's memory of ended jobs (MinJobAge).
            self.is_held_up = True
            self._ends.take_up()
            self._submit_if_possible(stage)

    def _submit_if_possible(self, stage: Stage) -> None:
        jobs = self._jobs
        if stage.id not in jobs.todo or stage.id in jobs.live or not self._ends.may_try(stage):
            return
        pending = [need for need in stage.needs if need in jobs.todo and not jobs.handle(need).is_done()]
        needed = [jobs.live[need] for need in pending if need in jobs.live]
        # Nothing can depend on a job of which Slurm may know nothing.
        job_ids = [attempt.job_id for attempt in needed if not jobs.tracker.is_missing(attempt)]
        after_ok = [job_id for job_id in job_ids if job_id is not None]
        if len(after_ok) == len(pending):
            self._submit(stage, after_ok)

    def _submit(self, stage: Stage, after_ok: Sequence[str]) -> None:
        """Submit a stage, unless another launcher has done so or is doing so."""
        handle = self._jobs.handle(stage.id)
        claim = handle.claim()
        if isinstance(claim, Holder):
            self.is_held_up = True
            return
        submitted = keep_renewed(claim)  # a controller that doesn't answer may take longer than a claim lasts
        try:
            verdict = handle.verify()
            if verdict.state == "done":
                self._jobs.todo.discard(stage.id)
                handle.discard_work()
            elif attempt := handle.open_attempt():
                self._jobs.live[stage.id] = attempt
            else:
                if verdict.state == "corrupt":
                    handle.set_aside()
                self._submit_claimed(stage, after_ok)
        finally:
            submitted.set()
            claim.release()

    def _submit_claimed(self, stage: Stage, after_ok: Sequence[str]) -> None:
        """Record the intent, submit, record the job; ``JobEnds`` repairs a death between any two of these steps."""
        submitting, handle = self._submitting, self._jobs.handle(stage.id)
        resources = submitting.profile.resources[stage.kind]
        slot = choose_slot(submitting.max_running, self._in_slots(), after_ok)
        if slot is None:
            self.is_held_up = True
            return
        attempt = self._attempts.begin(
            stage,
            resources.gpus,
            resources.cores,
            resources.time_minutes,
            slot.number,
            ranks=resources.ranks,
        )
        write_stage_file(handle, stage, submitting.provenance, attempt.intent.number)
        self._hand_over(attempt, self._request(stage, attempt, after_ok, slot.after_any))

    def _in_slots(self) -> list[JobAttempt]:
        """Return the attempts whose jobs may be in slots: also those that other launchers have submitted."""
        if self._submitting.max_running is None:
            return []
        if self._outside is None:
            live = self._jobs.live
            others = [it for it in self._attempts.open_attempts() if it.intent.stage_id not in live]
            # Asked anew, as another launcher may have submitted since this round began.
            names = {job.name for job in self._jobs.slurm.jobs().values() if job.is_live} if others else set()
            # Slurm would refuse a job that waits for one that it doesn't know.
            self._outside = [attempt for attempt in others if attempt.intent.job_name in names]
        return [*self._outside, *self._jobs.live.values()]

    def _request(self, stage: Stage, attempt: JobAttempt, after_ok: Sequence[str], after_any: str | None) -> Request:
        submitting = self._submitting
        resources = submitting.profile.resources[stage.kind]
        return Request(
            stage=stage,
            resources=resources,
            folder=attempt.folder,
            job_name=attempt.intent.job_name,
            snapshot=submitting.snapshot,
            threads=default_threads(resources, submitting.provenance.runtime.threads_per_rank),
            after_ok=after_ok,
            after_any=after_any,
            exclude=nodes_to_avoid(self._jobs.handle(stage.id).attempts()),
        )

    def _hand_over(self, attempt: JobAttempt, request: Request) -> None:
        """Submit, and record the job's id or why there is none."""
        jobs, stage = self._jobs, request.stage
        try:
            job_id = self._submit_anywhere(attempt, request)
        except SubmissionRefusedError as error:
            self._ends.close(stage, attempt, End(Cause.INPUT, str(error), time.time()))
            return
        except (SubmitLimitError, NeedEndedError) as error:
            self._ends.close(stage, attempt, End(Cause.NOT_ACCEPTED, str(error), time.time()))
            raise
        except SweepCancelledError:
            message = "the sweep was cancelled before this job was submitted; run the same command again to go on"
            self._ends.close(stage, attempt, End(Cause.CANCELLED, message, time.time()))
            raise
        except SlurmUnavailableError:
            jobs.live[stage.id] = attempt  # it may have arrived
            raise
        jobs.live[stage.id] = attempt
        if job_id is None:
            jobs.without_id.add(stage.id)
            message = "Slurm took a job without saying its id; it is looked for by name"
            jobs.tell(Event("waiting", stage, None, message))
            return
        attempt.record_job(job_id)
        jobs.tell(Event("submitted", stage, job_id))

    def _submit_anywhere(self, attempt: JobAttempt, request: Request) -> str | None:
        """Submit; if Slurm refuses to do without the nodes to avoid, which may be needed or gone, then for any node."""
        try:
            return self._write_and_submit(attempt, request)
        except SubmissionRefusedError as error:
            if not request.exclude:
                raise
            nodes = ", ".join(request.exclude)
            message = f"{error}, or Slurm can't do without {nodes}, where it has failed; submitted again for any node"
            self._jobs.tell(Event("waiting", request.stage, None, message))
            return self._write_and_submit(attempt, replace(request, exclude=()))

    def _write_and_submit(self, attempt: JobAttempt, request: Request) -> str | None:
        script = write_submission(request)
        # A job may outlive this machine, so what it reads and what tells the next launcher about it must do so as well.
        for folder in (attempt.folder, self._jobs.handle(request.stage.id).work):
            fsync_folders(folder, self._jobs.store.root)
        # Only now: whoever cancels later finds the intent, and waits for what becomes of it.
        self._require_wanted()
        return self._jobs.slurm.submit(script, attempt.intent.job_name)
