"""The Slurm backend: submits missing stages, adopts running jobs, retries jobs that died through no fault of theirs.

Round by round it observes, decides and acts. All it knows comes from files (artifacts, the ledger, heartbeats) and from
Slurm. So it may be closed at any time: the jobs go on, and the next launcher continues where this one stopped.
"""

from __future__ import annotations

import errno
import math
import shutil
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from hfprune_launch.slurm.causes import explain_end
from hfprune_launch.slurm.commands import (
    JobInfo,
    NotNowError,
    SlurmCommands,
    SlurmUnavailableError,
    SubmissionRefusedError,
)
from hfprune_launch.slurm.decide import Do, about_job, to_submit
from hfprune_launch.slurm.observe import Observer
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.script import JobRequest, default_threads, write_submission
from hfprune_launch.stage.run import Provenance, write_stage_file

from hfprune_dist.errors import UserError
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import fsync_folders
from hfprune_dist.store.attempts import Attempt, Cause, End, Ledger
from hfprune_dist.store.claims import Cancellation, Claim, Holder, keep_renewed
from hfprune_dist.store.stage import Stage

# Seconds between two squeues, and between two looks at what jobs have recorded.
ASK_S, LOOK_S = 60.0, 5.0
# At least this many times as long as a look at a large sweep takes passes before the next one.
PAUSE_FACTOR = 10
# For how long the store's file system may fail before a launcher gives up, or Slurm if it doesn't follow.
PATIENCE_S = 600.0
# A full or read-only disk, which stays so until somebody does something about it.
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


@dataclass(frozen=True)
class Event:
    """A message for the user: what happened, to which stage, and in which job."""

    what: str
    stage: Stage | None = None
    job_id: str | None = None
    message: str = ""


@dataclass
class Launcher:
    """Runs a sweep to its end, or as far as it can get; tells of every event, of waiting in every round. New jobs run
    the code in the folder ``snapshot``.
    """

    store: Store
    plan: Plan
    provenance: Provenance
    profile: Profile
    cancellation: Cancellation
    snapshot: Path
    slurm: SlurmCommands
    tell: Callable[[Event], None]
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self.ledger = Ledger(self.store)
        self.observer = Observer(self.ledger, self.slurm, self.clock)

    def step(self) -> None:
        """Do one round: look at the jobs, also those of earlier launchers, act on them, then submit what is missing."""
        attempts = self._open()
        self.observer.look(attempts)
        for attempt in attempts:
            job = self.observer.jobs.get(attempt.intent.job_name)
            if job is not None and attempt.job_id is None:
                self._adopt(attempt, job.job_id)
        states = self.observer.states(self.plan)
        for attempt in attempts:
            if (found := about_job(states[attempt.intent.stage_id])) is not None:
                self._act(attempt, *found)
        if self.observer.before is None:
            ended = [each for stage_id in self.plan.stages for each in self.ledger.jobs_of(stage_id) if each.end]
            self.observer.before = {attempt.intent.stage_id: attempt.intent.number for attempt in ended}
            others = [each.intent for each in self.ledger.open_jobs() if each.intent.stage_id not in self.plan.stages]
            if any(each.job_name in self.observer.jobs for each in others):
                told = "jobs of rows that aren't of this run, such as with other settings, wait or run too"
                self.tell(Event("waiting", message=f"{told}; --cancel ends all jobs"))
        self._submit_missing()

    def run(self, show: Callable[[], object], follow: bool, sleep: Callable[[float], None] = time.sleep) -> None:
        """Do rounds until every stage is done or has failed for good, or one without ``follow``; call ``show`` after
        every look at what jobs have recorded, of which there are several in a round.
        """
        began_at = answered_at = self.clock()
        asked_at, following, is_over, look = -math.inf, list[Attempt](), False, LOOK_S
        while True:
            try:
                if self.clock() - asked_at >= ASK_S or any(map(self._has_recorded_its_end, following)):
                    asked_at = self.clock()
                    self.step()
                    following = self._open()
                    is_wanted = not self.cancellation.is_requested()
                    is_over = not follow or not (following or (is_wanted and self._left()))
                shown_at = self.clock()
                show()
                if is_over:
                    return
                answered_at = self.clock()
                look = min(ASK_S, max(LOOK_S, PAUSE_FACTOR * (answered_at - shown_at)))
            except SlurmUnavailableError as error:
                answered_at = self.clock()
                if not follow and answered_at - began_at >= PATIENCE_S:
                    raise
                self.tell(Event("waiting", message=f"Slurm does not answer ({error}); jobs go on meanwhile"))
            except (OSError, UserError) as error:
                if not _may_pass(error) or self.clock() - answered_at >= PATIENCE_S:
                    raise
                self.tell(Event("waiting", message=f"the store fails ({error}); jobs go on, and it is tried again"))
            sleep(look)

    def unsubmitted(self) -> list[Stage]:
        """Return missing stages without a job: refused, claimed by another launcher, or without room in the queue."""
        states = self.observer.states(self.plan).values()
        return [self.plan.stages[each.stage_id] for each in states if each.is_wanted and not each.has_attempt]

    # Observe.

    def _open(self) -> list[Attempt]:
        return [each for stage_id in self.plan.stages if (each := self.ledger.open_job(stage_id)) is not None]

    def _has_recorded_its_end(self, attempt: Attempt) -> bool:
        """Return whether the store says that a job is over which ran, or was submitted, when Slurm was asked."""
        job = self.observer.jobs.get(attempt.intent.job_name)
        if job is not None and (job.is_waiting or not job.is_live):
            return False  # one that waits may have been requeued since it recorded an end
        return attempt.exit_record() is not None or self.store.handle(attempt.intent.stage_id).is_committed()

    def _left(self) -> list[list[str]]:
        """Return the jobs that can be submitted by now, or later in a queue that is full at present."""
        return to_submit(self.observer.states(self.plan), self.profile.allocation)

    # Act on jobs.

    def _adopt(self, attempt: Attempt, job_id: str) -> None:
        attempt.record_job(job_id)
        self.tell(Event("adopted", self.plan.stages[attempt.intent.stage_id], job_id))

    def _act(self, attempt: Attempt, do: Do, message: str) -> None:
        if attempt.end is not None:
            return  # another launcher was faster
        stage, job = self.plan.stages[attempt.intent.stage_id], self.observer.jobs.get(attempt.intent.job_name)
        match do:
            case Do.CANCEL if job is not None:
                self.slurm.cancel([job.job_id])
            case Do.CLOSE:
                self._close(stage, attempt, job)
            case Do.SETTLE:
                self._settle(stage, attempt, job)
            case Do.TELL:
                self.tell(Event("waiting", stage, attempt.job_id, message))

    def _settle(self, stage: Stage, attempt: Attempt, job: JobInfo | None) -> None:
        """Close an attempt whose job Slurm doesn't know, unless the stage's claim shows that somebody is at it."""
        with self.store.handle(stage.id).claimed_briefly() as claim:
            if claim is None or (job is None and attempt.job_id is not None):
                return  # its job lives, its launcher is submitting it, or another one has just found it
            if job is None:
                if (found := self.slurm.jobs().get(attempt.intent.job_name)) is not None:
                    self._adopt(attempt, found.job_id)
                    return
                if (job_id := self.slurm.find(attempt.intent.job_name)) is not None:  # squeue may have missed it
                    self._adopt(attempt, job_id)
                    return
            self._close(stage, attempt, job)

    def _close(self, stage: Stage, attempt: Attempt, job: JobInfo | None) -> None:
        self._end(stage, attempt, explain_end(self.ledger, stage, attempt, job))

    def _end(self, stage: Stage, attempt: Attempt, end: End) -> None:
        """Record how an attempt ended, for the next launcher and the report."""
        handle = self.store.handle(stage.id)
        if attempt.job_id is not None:
            with handle.claimed_briefly(attempt.job_id):  # frees the stage if the job held it
                pass
        attempt.close(end)
        if end.cause == Cause.DONE:
            handle.discard_work()  # for a job that died between its commit and its end
            self.tell(Event("done", stage, attempt.job_id))
            return
        self.observer.verified.clear()  # the stage may have found an artifact damaged
        self.tell(Event("ended", stage, attempt.job_id, f"{end.cause}: {end.message}"))

    # Submit.

    def _submit_missing(self) -> None:
        """Submit every missing stage whose inputs exist or are being made, in plan order; nothing once cancelled."""
        queues = Counter(job.shared for job in self.observer.jobs.values() if job.is_live)
        try:
            for chain in self._left():
                self._submit([self.plan.stages[stage_id] for stage_id in chain], queues)
        except NotNowError as error:
            self.tell(Event("waiting", message=str(error)))

    def _submit(self, chain: list[Stage], queues: Counter[str]) -> None:
        """Submit a job that runs a chain of stages, up to the first that another launcher has. Under a limit it shares
        its name with others of the store, of which Slurm runs one at a time (singleton): that with the shortest queue.
        """
        needs = {need for stage in chain for need in stage.needs} - {stage.id for stage in chain}
        needed = [self.ledger.open_job(need) for need in sorted(needs) if not self.observer.is_done(need)]
        jobs = [None if attempt is None else attempt.job_id for attempt in needed]
        if None in jobs:
            return  # what it has to wait for was refused, or has no known id
        names = [f"hfprune-{self.ledger.mark}-{number}" for number in range(1, (self.profile.max_running or 0) + 1)]
        shared = min(names, key=queues.__getitem__, default="")
        dependencies = [*sorted({f"afterok:{job_id}" for job_id in jobs}), *["singleton"] * bool(shared)]
        with ExitStack() as claims:
            claimed: list[tuple[Stage, Claim]] = []
            for stage in chain:
                if (claim := self._claim(claims, stage)) is None:
                    break
                claimed.append((stage, claim))
            if claimed and self._submit_claimed(claimed, sorted(needs), dependencies, shared):
                queues[shared] += 1

    def _claim(self, claims: ExitStack, stage: Stage) -> Claim | None:
        """Claim a stage until ``claims`` is closed; return the claim if the stage still has to be submitted."""
        handle = self.store.handle(stage.id)
        claim = handle.claim()
        if isinstance(claim, Holder):
            return None
        claims.callback(claim.release)
        claims.callback(keep_renewed(claim).set)  # a controller that doesn't answer may take longer than a claim lasts
        verdict = handle.verify()
        if verdict.state == "done":
            handle.discard_work()
        elif self.ledger.open_job(stage.id) is None:
            if verdict.state == "corrupt":
                handle.set_aside(claim)
            return claim
        return None

    def _submit_claimed(
        self, claimed: list[tuple[Stage, Claim]], needs: list[str], dependencies: list[str], shared: str
    ) -> bool:
        """Record the intent, submit, and record the job; False if Slurm refuses it. If the launcher dies between any
        two of these steps, a later round repairs that.
        """
        chain = [stage for stage, _ in claimed]
        resources = self.profile.of_job([stage.kind for stage in chain])
        attempts: list[Attempt] = []
        for stage, claim in claimed:
            leader = attempts[0] if attempts else None
            attempt = self.ledger.begin(stage, claim, time_minutes=resources.time_minutes, leader=leader, needs=needs)
            write_stage_file(self.store.handle(stage.id), stage, self.provenance, attempt.intent.number)
            attempts.append(attempt)
        request = JobRequest(
            resources=resources,
            folders=[attempt.folder for attempt in attempts],
            name=attempts[0].intent.job_name,
            shared=shared,
            snapshot=self.snapshot,
            threads=default_threads(resources, self.provenance.runtime.threads_per_rank),
            dependencies=dependencies,
        )
        script = write_submission(request)
        # A job may outlive this machine: what it reads, and what tells the next launcher of it, must do so as well.
        for folder in (*request.folders, *(self.store.handle(stage.id).work for stage in chain)):
            fsync_folders(folder, self.store.root)
        try:
            # Only now: whoever cancels later finds the intent, and waits for what becomes of it.
            if self.cancellation.is_requested():
                raise NotNowError("another command has cancelled this; run the same command again to resume")
            job_id = self.slurm.submit(script)
        except SubmissionRefusedError as error:
            for stage, attempt in zip(chain, attempts, strict=True):
                self._end(stage, attempt, End(Cause.INPUT, f"{error}; check the profile", time.time()))
            return False
        except NotNowError:
            for attempt in reversed(attempts):
                shutil.rmtree(attempt.folder, ignore_errors=True)  # as if it had never been
            raise
        attempts[0].record_job(job_id)
        for stage in chain:
            self.tell(Event("submitted", stage, job_id))
        return True


def _may_pass(error: Exception) -> bool:
    """Return whether an error is a file system's that may pass by itself, such as EIO, or EACCES without a ticket."""
    found = error if isinstance(error, OSError) else error.__context__  # a ``UserError`` about a file has it there
    return isinstance(found, OSError) and found.errno not in LASTING
