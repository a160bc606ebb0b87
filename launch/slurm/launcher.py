"""The Slurm backend: submits missing stages, adopts running jobs, retries jobs that died through no fault of theirs.

Round by round it observes, decides and acts. All it knows comes from files (artifacts, the ledger, heartbeats) and from
Slurm. So it may be closed at any time: the jobs go on, and the next launcher continues where this one stopped.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from hfprune_launch.slurm.causes import Cause, explain_end, no_node_suits, nodes_to_avoid
from hfprune_launch.slurm.commands import (
    JobInfo,
    NotNowError,
    SlurmCommands,
    SlurmUnavailableError,
    SubmissionRefusedError,
)
from hfprune_launch.slurm.decide import Action, Do, StageState, about_jobs, job_to_wait_for, to_submit
from hfprune_launch.slurm.observe import Observer
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.script import Request, default_threads, write_submission
from hfprune_launch.stage.stage_file import Provenance, write_stage_file

from hfprune_dist.errors import UserError
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import fsync_folders
from hfprune_dist.store.attempts import SCRIPT, Attempt, End, Ledger
from hfprune_dist.store.claims import Cancellation, Holder, keep_renewed
from hfprune_dist.store.heartbeat import Failure
from hfprune_dist.store.stage import Stage

# Seconds between two squeues, and between two looks at what jobs have recorded.
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
LOOK_S = 10.0
# For how long the store's file system may fail before a launcher gives up.
STORE_PATIENCE_S = 600.0
# A full or read-only disk, which stays so until somebody does something about it.
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
CANCELLED = "another command has cancelled this, so nothing more is submitted; run the same command again to go on"


@dataclass(frozen=True)
class Event:
    """A message for the user: what happened, to which stage, and in which job."""

    what: str
    stage: Stage | None = None
    job_id: str | None = None
    message: str = ""


@dataclass(frozen=True)
class NewJobs:
    """Settings for new jobs.

    Attributes:
        max_running: the most jobs of the store that run at once; None for no limit.
        cancellation: tells whether jobs are still wanted.
        snapshot: folder of the code that jobs run.
    """

    provenance: Provenance
    profile: Profile
    max_running: int | None
    cancellation: Cancellation
    snapshot: Path


class Launcher:
    """Runs a sweep to its end, or as far as it can get.

    Args:
        tell: called with every event; with one about waiting, in every round.
        clock: seconds of a monotonic clock.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        new_jobs: NewJobs,
        slurm: SlurmCommands,
        tell: Callable[[Event], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._plan = plan
        self._new_jobs = new_jobs
        self._slurm = slurm
        self._tell = tell
        self._clock = clock
        self._ledger = Ledger(store)
        self._observer = Observer(self._ledger, slurm, clock)
        # Number of the last attempt at each stage that ended before this command began: a new command tries anew.
        self._before: dict[str, int] | None = None

    @property
    def jobs(self) -> Mapping[str, JobInfo]:
        """The jobs that the last round saw, by name."""
        return self._observer.jobs

    def step(self) -> None:
        """Do one round: look at the jobs, do what is to be done about them, then submit what is missing.

        The first round takes over what earlier launchers left.
        """
        self._look()
        for action in about_jobs(self._states()):
            self._act(action)
        if self._before is None:
            self._before = {stage_id: self._last_ended(stage_id) for stage_id in self._plan.stages}
        self._submit_missing()

    def follow(self, show: Callable[[], object], sleep: Callable[[float], None] = time.sleep) -> None:
        """Do rounds until every stage is done or has failed for good.

        Args:
            show: called after every look at what jobs have recorded.
        """
        waited, wait, answered_at = 0.0, SHORTEST_WAIT_S, self._clock()
        following: list[Attempt] = []
        goes_on = True
        while goes_on:
            sleep(min(wait, LOOK_S))
            waited += min(wait, LOOK_S)
            try:
                if waited >= wait or any(map(self._has_recorded_its_end, following)):
                    before, waited = {attempt.folder for attempt in following}, 0.0
                    self.step()
                    following = self._open()
                    goes_on = bool(following) or self._may_submit()
                    is_new = {attempt.folder for attempt in following} != before
                    wait = SHORTEST_WAIT_S if is_new else min(LONGEST_WAIT_S, wait * 1.5)
                show()
                answered_at = self._clock()
            except SlurmUnavailableError as error:
                answered_at, wait = self._clock(), min(LONGEST_WAIT_S, wait * 1.5)
                self._tell(Event("waiting", message=f"Slurm does not answer ({error}); jobs go on meanwhile"))
            except (OSError, UserError) as error:
                if not _may_pass(error) or self._clock() - answered_at >= STORE_PATIENCE_S:
                    raise
                message = f"the store can't be read or written ({error}); jobs go on, and it is tried again"
                self._tell(Event("waiting", message=message))

    def unsubmitted(self) -> list[Stage]:
        """Return missing stages without a job: refused, claimed by another launcher, or without room in the queue."""
        return [
            self._plan.stages[state.stage_id]
            for state in self._states().values()
            if state.is_wanted and not state.has_attempt
        ]

    # Observe.

    def _open(self) -> list[Attempt]:
        attempts = (self._ledger.open_job(stage_id) for stage_id in self._plan.stages)
        return [attempt for attempt in attempts if attempt is not None]

    def _states(self) -> dict[str, StageState]:
        return self._observer.states(self._plan, self._before or {})

    def _last_ended(self, stage_id: str) -> int:
        ended = (attempt.intent.number for attempt in self._ledger.jobs_of(stage_id) if attempt.end is not None)
        return max(ended, default=0)

    def _has_recorded_its_end(self, attempt: Attempt) -> bool:
        """Return whether the store says that a job which ran is over, before Slurm is asked."""
        job = self._observer.jobs.get(attempt.intent.job_name)
        if job is None or not job.is_live or job.is_waiting:
            return False
        return attempt.exit_record() is not None or self._store.handle(attempt.intent.stage_id).is_committed()

    def _may_submit(self) -> bool:
        """Return whether a stage could not be submitted that can be later."""
        return not self._new_jobs.cancellation.is_requested() and bool(to_submit(self._states()))

    # Act on jobs.

    def _look(self) -> None:
        """Ask Slurm about the jobs of open attempts, and record the ids of those that were found by their names."""
        attempts = self._open()
        self._observer.look(attempts)
        for attempt in attempts:
            job = self._observer.jobs.get(attempt.intent.job_name)
            if job is not None and attempt.job_id is None:
                self._adopt(attempt, job.job_id)

    def _adopt(self, attempt: Attempt, job_id: str) -> None:
        attempt.record_job(job_id)
        self._tell(Event("adopted", self._plan.stages[attempt.intent.stage_id], job_id))

    def _act(self, action: Action) -> None:
        stage, attempt = self._plan.stages[action.stage_id], self._ledger.open_job(action.stage_id)
        if attempt is None:
            return  # another launcher was faster
        job = self._observer.jobs.get(attempt.intent.job_name)
        match action.do:
            case Do.CANCEL if job is not None:
                self._slurm.cancel([job.job_id])
            case Do.CLOSE:
                self._end(stage, attempt, explain_end(self._ledger, stage, attempt, job))
            case Do.SETTLE:
                self._settle(stage, attempt, job)
            case Do.TELL:
                self._tell(Event("waiting", stage, attempt.job_id, action.message))

    def _settle(self, stage: Stage, attempt: Attempt, job: JobInfo | None) -> None:
        """Close an attempt whose job Slurm doesn't know, unless the stage's claim shows that somebody is at it."""
        claim = self._store.handle(stage.id).claim()
        if isinstance(claim, Holder):
            return  # its job lives, or its launcher is submitting it
        try:
            if job is None:
                if attempt.job_id is not None:
                    return  # another launcher has just found it
                if (found := self._slurm.find(attempt.intent.job_name)) is not None:
                    self._adopt(attempt, found)
                    return
                if (attempt.folder / SCRIPT).exists():  # otherwise its launcher died before sbatch
                    self._slurm.cancel_named(attempt.intent.job_name)  # squeue may have missed it
            self._end(stage, attempt, explain_end(self._ledger, stage, attempt, job))
        finally:
            claim.release()

    def _end(self, stage: Stage, attempt: Attempt, end: End) -> None:
        """Record how an attempt ended, for the next launcher and the report."""
        handle = self._store.handle(stage.id)
        if attempt.job_id is not None:
            handle.release_claim_of(attempt.job_id)
        attempt.close(end)
        if end.cause == Cause.DONE:
            handle.discard_work()  # for a job that died between its commit and its end
            self._tell(Event("done", stage, attempt.job_id))
            return
        # Leave the cause for the report, instead of what the ranks said as they died.
        handle.work.mkdir(parents=True, exist_ok=True)
        handle.clear_failures()
        if end.cause != Cause.NOT_RUN:  # which says nothing about the stage
            handle.report_failure(Failure(end.cause, end.message, -1, end.at, attempt.intent.number))
        self._observer.forget_artifacts()
        self._tell(Event("ended", stage, attempt.job_id, f"{end.cause}: {end.message}"))

    # Submit.

    def _submit_missing(self) -> None:
        """Submit every missing stage whose inputs exist or are being made, in plan order; nothing once cancelled."""
        # Under a limit, other launchers must not submit between our look at the queue and our last submission.
        with nullcontext() if self._new_jobs.max_running is None else self._ledger.locked():
            missing = to_submit(self._states())
            try:
                queue = self._queue() if missing else []
                for stage_id in missing:
                    self._submit(self._plan.stages[stage_id], queue)
            except NotNowError as error:
                self._tell(Event("waiting", message=str(error)))

    def _queue(self) -> list[str]:
        """Return the ids of the store's jobs that wait or run, in the order of their submission, if they are limited.

        Those of other sweeps count if Slurm lists them, as it would refuse a job that waits for one it doesn't know. An
        id that isn't known (yet) is empty.
        """
        self._require_wanted()
        if self._new_jobs.max_running is None:
            return []
        jobs = self._slurm.jobs()  # asked anew, as another launcher may have submitted since this round began
        attempts = sorted(self._ledger.open_jobs(), key=lambda attempt: attempt.intent.created)
        return [
            attempt.job_id or ""
            for attempt in attempts
            if attempt.intent.stage_id in self._plan.stages or _is_live(jobs.get(attempt.intent.job_name))
        ]

    def _require_wanted(self) -> None:
        if self._new_jobs.cancellation.is_requested():
            raise NotNowError(CANCELLED)

    def _submit(self, stage: Stage, queue: list[str]) -> None:
        """Submit a stage, unless another launcher has done so or is doing so.

        Args:
            queue: as ``_queue`` returns it; the new job is added.
        """
        handle = self._store.handle(stage.id)
        pending = [need for need in stage.needs if not self._observer.is_done(need)]
        needed = [self._ledger.open_job(need) for need in pending]
        after_ok = [job_id for attempt in needed if attempt is not None and (job_id := attempt.job_id) is not None]
        after_any = job_to_wait_for(self._new_jobs.max_running, queue)
        if len(after_ok) < len(pending) or after_any == "":
            return  # what it has to wait for was refused, or has no known id
        claim = self._store.handle(stage.id).claim()
        if isinstance(claim, Holder):
            return
        submitted = keep_renewed(claim)  # a controller that doesn't answer may take longer than a claim lasts
        try:
            verdict = handle.verify()
            if verdict.state == "done":
                handle.discard_work()
            elif self._ledger.open_job(stage.id) is None:
                if verdict.state == "corrupt":
                    handle.set_aside(claim)
                if job_id := self._submit_claimed(stage, after_ok, after_any):
                    queue.append(job_id)
        finally:
            submitted.set()
            claim.release()

    def _submit_claimed(self, stage: Stage, after_ok: list[str], after_any: str | None) -> str | None:
        """Record the intent, submit, record the job and return its id; None if Slurm refuses it.

        Later rounds repair a death between any two of these steps.
        """
        new, resources = self._new_jobs, self._new_jobs.profile.resources[stage.kind]
        avoided = nodes_to_avoid(self._ledger.jobs_of(stage.id))
        attempt = self._ledger.begin(stage, ranks=resources.ranks, time_minutes=resources.time_minutes, avoided=avoided)
        write_stage_file(self._store.handle(stage.id), stage, new.provenance, attempt.intent.number)
        request = Request(
            stage=stage,
            resources=resources,
            folder=attempt.folder,
            job_name=attempt.intent.job_name,
            snapshot=new.snapshot,
            threads=default_threads(resources, new.provenance.runtime.threads_per_rank),
            after_ok=after_ok,
            after_any=after_any,
            exclude=avoided,
        )
        script = write_submission(request)
        # A job may outlive this machine: what it reads, and what tells the next launcher of it, must do so as well.
        for folder in (attempt.folder, self._store.handle(stage.id).work):
            fsync_folders(folder, self._store.root)
        try:
            # Only now: whoever cancels later finds the intent, and waits for what becomes of it.
            self._require_wanted()
            job_id = self._slurm.submit(script, attempt.intent.job_name)
        except SubmissionRefusedError as error:
            self._end(stage, attempt, End(*no_node_suits(str(error), avoided), time.time()))
            return None
        except NotNowError:
            attempt.withdraw()
            raise
        attempt.record_job(job_id)
        self._tell(Event("submitted", stage, job_id))
        return job_id


def _is_live(job: JobInfo | None) -> bool:
    return job is not None and job.is_live


def _may_pass(error: Exception) -> bool:
    """Return whether an error is a file system's that may pass by itself, such as EIO, or EACCES without a ticket."""
    found = error if isinstance(error, OSError) else error.__context__  # a ``UserError`` about a file has it there
    return isinstance(found, OSError) and found.errno not in LASTING
