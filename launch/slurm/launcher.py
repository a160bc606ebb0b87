"""The Slurm backend: submits missing stages, adopts running jobs, retries jobs that died through no fault of theirs.

Round by round it observes, decides and acts. All it knows comes from files (artifacts, the ledger, heartbeats) and from
Slurm. So it may be closed at any time: the jobs go on, and the next launcher continues where this one stopped.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

from hfprune_launch.slurm.causes import Cause, explain_end, nodes_to_avoid
from hfprune_launch.slurm.commands import (
    JobInfo,
    NeedEndedError,
    SlurmCommands,
    SlurmUnavailableError,
    SubmissionRefusedError,
    SubmitLimitError,
)
from hfprune_launch.slurm.decide import GONE_AFTER_S, Action, Do, InSlot, Sight, StageState, choose_slot, decide
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
MISSING = (Sight.MISSING, Sight.INTENDED)
BELOW_THE_LIMIT = (
    "the rest is submitted when jobs have ended; if none of yours is queued, the limit allows none, or other users' "
    "jobs reach it: then name another account, qos or partition in the profile"
)


@dataclass(frozen=True)
class Event:
    """A message for the user: what happened, to which stage, and in which job."""

    what: str
    stage: Stage | None
    job_id: str | None = None
    message: str = ""


@dataclass(frozen=True)
class NewJobs:
    """Settings for new jobs.

    Attributes:
        max_running: the most jobs of the sweep that run at once; None for no limit.
        cancellation: tells whether jobs are still wanted.
        snapshot: folder of the code that jobs run.
    """

    provenance: Provenance
    profile: Profile
    max_running: int | None
    cancellation: Cancellation
    snapshot: Path


class _CancelledError(Exception):
    """Another command has cancelled the sweep since this launcher was started."""


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
        self._before: dict[str, int] = {}
        # What the last round left: open attempts, and whether a stage could not be submitted that can be later.
        self._following: list[Attempt] = []
        self._is_held_up = False

    @property
    def jobs(self) -> Mapping[str, JobInfo]:
        """The jobs that the last round saw, by name."""
        return self._observer.jobs

    def start(self) -> None:
        """Take over what earlier launchers left, then submit missing stages."""
        self._look()
        self._close_ended()
        for stage_id in self._plan.stages:
            ended = [attempt for attempt in self._ledger.jobs_of(stage_id) if attempt.end is not None]
            self._before[stage_id] = ended[-1].intent.number if ended else 0
        self._submit_missing()

    def step(self) -> None:
        """Do one round."""
        self._look()
        self._close_ended()
        self._submit_missing()

    def follow(
        self,
        show: Callable[[], object],
        sleep: Callable[[float], None] = time.sleep,
        *,
        only_missing: bool = False,
    ) -> None:
        """Continue until every stage is done or has failed for good.

        Args:
            show: called after every round.
            only_missing: continue only until it is known for every job whether it is over, for at most a few minutes.
        """
        deadline = self._clock() + 2 * GONE_AFTER_S

        def goes_on() -> bool:
            if not only_missing:
                return bool(self._following) or self._is_held_up
            is_missing = any(state.sight in MISSING for state in self._states().values())
            return is_missing and self._clock() < deadline

        wait, going = SHORTEST_WAIT_S, goes_on()
        asked_at = answered_at = self._clock()
        while going:
            sleep(min(wait, LOOK_S))
            before = [attempt.folder for attempt in self._following]
            try:
                if self._clock() - asked_at >= wait or self._is_any_end_recorded():
                    asked_at, wait = self._clock(), min(LONGEST_WAIT_S, wait * 1.5)
                    self._step_if_answered()
                    going = goes_on()
                show()
                answered_at = self._clock()
            except (OSError, UserError) as error:
                if not _may_pass(error) or self._clock() - answered_at >= STORE_PATIENCE_S:
                    raise
                message = f"the store can't be read or written ({error}); jobs go on, and it is tried again"
                self._tell(Event("waiting", None, None, message))
            if [attempt.folder for attempt in self._following] != before:
                wait = SHORTEST_WAIT_S

    def unsubmitted(self) -> list[Stage]:
        """Return missing stages without a job: refused, claimed by another launcher, or without room in the queue."""
        return [
            self._plan.stages[state.stage_id]
            for state in self._states().values()
            if state.is_wanted and state.sight is Sight.NO_ATTEMPT
        ]

    # Observe.

    def _open(self) -> list[Attempt]:
        attempts = (self._ledger.open_job(stage_id) for stage_id in self._plan.stages)
        return [attempt for attempt in attempts if attempt is not None]

    def _look(self) -> None:
        self._following = self._open()
        self._observer.look(self._following)

    def _states(self) -> dict[str, StageState]:
        return self._observer.states(self._plan, self._before)

    # Act.

    def _close_ended(self) -> None:
        """Do what is to be done about jobs."""
        for action in decide(self._states()):
            attempt = self._ledger.open_job(action.stage_id)
            if action.do is not Do.SUBMIT and attempt is not None:
                self._act(action, self._plan.stages[action.stage_id], attempt)

    def _act(self, action: Action, stage: Stage, attempt: Attempt) -> None:
        job = self._observer.jobs.get(attempt.intent.job_name)
        match action.do:
            case Do.ADOPT if job is not None:
                attempt.record_job(job.job_id)
                self._tell(Event("adopted", stage, job.job_id))
            case Do.CANCEL if job is not None:
                self._slurm.cancel([job.job_id])
            case Do.CLOSE:
                self._end(stage, attempt, explain_end(self._ledger, stage, attempt, job))
            case Do.CLOSE_UNLESS_CLAIMED | Do.SETTLE:
                claim = self._ledger.claim(stage.id)
                if isinstance(claim, Holder):
                    return  # its job lives, or its launcher is submitting it
                try:
                    if action.do is Do.CLOSE_UNLESS_CLAIMED or self._store.handle(stage.id).is_done():
                        self._end(stage, attempt, explain_end(self._ledger, stage, attempt, None))
                    else:
                        self._settle(stage, attempt)
                finally:
                    claim.release()
            case Do.TELL:
                self._tell(Event("waiting", stage, attempt.job_id, action.message))

    def _settle(self, stage: Stage, attempt: Attempt) -> None:
        """Look for the job of an intent a second time, under the stage's claim; if there is none, close the attempt."""
        recorded = attempt.job_id  # before squeue: a recorded job is in squeue or over
        found = self._slurm.find(attempt.intent.job_name)
        if found is not None:
            attempt.record_job(found)
            self._tell(Event("adopted", stage, found))
        elif recorded is None:
            if (attempt.folder / SCRIPT).exists():  # otherwise its launcher died before sbatch
                self._slurm.cancel_named(attempt.intent.job_name)  # squeue may have missed it
            self._end(stage, attempt, End(Cause.NOT_RUN, "the launcher died while it submitted", time.time(), False))

    def _end(self, stage: Stage, attempt: Attempt, end: End) -> None:
        """Record how an attempt ended, for the next launcher and the report."""
        attempt.close(end)
        handle = self._store.handle(stage.id)
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
        self._is_held_up = False
        # Under a limit, other launchers must not take slots that this one is about to find free.
        alone = nullcontext() if self._new_jobs.max_running is None else self._ledger.locked()
        try:
            with alone:
                to_submit = [it.stage_id for it in decide(self._states()) if it.do is Do.SUBMIT]
                if to_submit:
                    self._require_wanted()
                    slots = self._slots()
                    for stage_id in to_submit:
                        self._submit(self._plan.stages[stage_id], slots)
        except (SubmitLimitError, NeedEndedError) as error:
            self._is_held_up = True
            why = BELOW_THE_LIMIT if isinstance(error, SubmitLimitError) else "tried again"
            self._tell(Event("waiting", None, None, f"{error}; {why}"))
        except _CancelledError:
            message = "by another command, so nothing more is submitted; run the same command again to go on"
            self._tell(Event("cancelled", None, None, message))
        finally:
            self._following = self._open()

    def _require_wanted(self) -> None:
        if self._new_jobs.cancellation.is_requested():
            raise _CancelledError

    def _submit(self, stage: Stage, slots: list[InSlot]) -> None:
        """Submit a stage, unless another launcher has done so or is doing so.

        Args:
            slots: those of all live jobs, to which its own is added.
        """
        handle = self._store.handle(stage.id)
        pending = [need for need in stage.needs if not self._observer.is_done(need)]
        needed = [self._ledger.open_job(need) for need in pending]
        after_ok = [job_id for attempt in needed if attempt is not None and (job_id := attempt.job_id) is not None]
        if len(after_ok) < len(pending):
            return  # what it needs was refused, or has no known id
        claim = self._ledger.claim(stage.id)
        if isinstance(claim, Holder):
            self._is_held_up = True
            return
        submitted = keep_renewed(claim)  # a controller that doesn't answer may take longer than a claim lasts
        try:
            verdict = handle.verify()
            if verdict.state == "done":
                handle.discard_work()
            elif self._ledger.open_job(stage.id) is None:
                if verdict.state == "corrupt":
                    handle.set_aside()
                self._submit_claimed(stage, after_ok, slots)
        finally:
            submitted.set()
            claim.release()

    def _submit_claimed(self, stage: Stage, after_ok: Sequence[str], slots: list[InSlot]) -> None:
        """Record the intent, submit, record the job; later rounds repair a death between any two of these steps."""
        new, resources = self._new_jobs, self._new_jobs.profile.resources[stage.kind]
        slot: tuple[int | None, str | None] | None = None, None
        if new.max_running is not None:
            slot = choose_slot(new.max_running, slots, after_ok)
        if slot is None:
            self._is_held_up = True
            return
        avoided = nodes_to_avoid(self._ledger.jobs_of(stage.id))
        attempt = self._ledger.begin(
            stage,
            ranks=resources.ranks,
            time_minutes=resources.time_minutes,
            slot=slot[0],
            avoided=avoided,
        )
        write_stage_file(self._store.handle(stage.id), stage, new.provenance, attempt.intent.number)
        request = Request(
            stage=stage,
            resources=resources,
            folder=attempt.folder,
            job_name=attempt.intent.job_name,
            snapshot=new.snapshot,
            threads=default_threads(resources, new.provenance.runtime.threads_per_rank),
            after_ok=after_ok,
            after_any=slot[1],
            exclude=avoided,
        )
        self._hand_over(stage, attempt, request)
        if attempt.end is None:
            slots += _in_slots([attempt])

    def _hand_over(self, stage: Stage, attempt: Attempt, request: Request) -> None:
        """Submit, and record the job's id or why there is none."""
        try:
            script = write_submission(request)
            # A job may outlive this machine: what it reads, and what tells the next launcher of it, must do so as well.
            for folder in (attempt.folder, self._store.handle(stage.id).work):
                fsync_folders(folder, self._store.root)
            # Only now: whoever cancels later finds the intent, and waits for what becomes of it.
            self._require_wanted()
            job_id = self._slurm.submit(script, attempt.intent.job_name)
        except SubmissionRefusedError as error:
            if request.exclude:  # which may be needed, or gone
                nodes = ", ".join(request.exclude)
                message = f"{error}, or Slurm can't do without {nodes}, where it has failed; submitted for any node"
                self._tell(Event("waiting", stage, None, message))
                self._hand_over(stage, attempt, replace(request, exclude=()))
            else:
                self._end(stage, attempt, End(Cause.INPUT, str(error), time.time()))
            return
        except (SubmitLimitError, NeedEndedError, _CancelledError):
            attempt.withdraw()
            raise
        attempt.record_job(job_id)
        self._tell(Event("submitted", stage, job_id))

    def _slots(self) -> list[InSlot]:
        """Return the slots in which jobs are; those of other sweeps if Slurm lists them, as it would refuse a job that
        waits for one that it doesn't know.
        """
        if self._new_jobs.max_running is None:
            return []
        others = [it for it in self._ledger.open_jobs() if it.intent.stage_id not in self._plan.stages]
        # Asked anew, as another launcher may have submitted since this round began.
        jobs = self._slurm.jobs() if others else {}
        listed = (it for it in others if it.intent.job_name in jobs and jobs[it.intent.job_name].is_live)
        return _in_slots([*listed, *self._open()])

    def _step_if_answered(self) -> None:
        try:
            self.step()
        except SlurmUnavailableError as error:
            self._tell(Event("waiting", None, None, f"Slurm does not answer ({error}); jobs go on meanwhile"))

    def _is_any_end_recorded(self) -> bool:
        """Return whether the store says that a job is over, before Slurm is asked."""
        jobs = ((attempt, self._observer.jobs.get(attempt.intent.job_name)) for attempt in self._following)
        running = [attempt for attempt, job in jobs if job is not None and job.is_live and not job.is_waiting]
        return any(it.exit_record() or self._store.handle(it.intent.stage_id).is_committed() for it in running)


def _in_slots(attempts: Iterable[Attempt]) -> list[InSlot]:
    intents = [(attempt.intent, attempt.job_id) for attempt in attempts]
    return [InSlot(it.slot, it.created, job_id) for it, job_id in intents if it.slot is not None]


def _may_pass(error: Exception) -> bool:
    """Return whether an error is a file system's that may pass by itself, such as EIO, or EACCES without a ticket."""
    found = error if isinstance(error, OSError) else error.__context__  # a ``UserError`` about a file has it there
    return isinstance(found, OSError) and found.errno not in LASTING
