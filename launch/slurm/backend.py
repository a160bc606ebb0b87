"""The Slurm backend: submits what is missing, adopts what runs, tries again what died by no fault of its own.

All it knows comes from files (artifacts, ledger, heartbeats) and from Slurm: one squeue call per round, and more only
about jobs that squeue does not list. So it may be closed at any time: the jobs go on, and the next launcher takes up
where this one stopped.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hfprune_launch.slurm.attempts import GONE, NEED_ENDED, QUEUE_FULL, SCRIPT, Attempt, End, Ledger
from hfprune_launch.slurm.batch_script import Request, default_threads, write_submission
from hfprune_launch.slurm.commands import (
    JobInfo,
    NeedEndedError,
    SlurmCommands,
    SlurmUnavailableError,
    SubmissionRefusedError,
    SubmitLimitError,
)
from hfprune_launch.slurm.exit_causes import RETRIES, explain_end
from hfprune_launch.slurm.pending_jobs import PendingJobs
from hfprune_launch.slurm.profile import Profile
from hfprune_launch.slurm.whereabouts import GONE_AFTER_S, Sighting, Whereabouts
from hfprune_launch.stage.stage_file import Provenance, write_stage_file

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import fsync_folders
from hfprune_dist.store.claims import Holder, try_claim
from hfprune_dist.store.heartbeat import Failure, clear_failures, write_failure_record
from hfprune_dist.store.stage import Stage

Jobs = Mapping[str, JobInfo]
# How long after a job has completed its artifact has to be visible here (file systems lag).
LAG_S = 60.0
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 10.0
# The reason lies in another stage or outside: the stage itself has no failure to report.
NO_FAILURE = ("dependency", "duplicate", "lost job", QUEUE_FULL, NEED_ENDED)
EXCLUDING_ATTEMPTS = 3


@dataclass(frozen=True)
class Event:
    """Something that the user is told: what happened to a stage, and in which job."""

    what: str
    stage: Stage | None
    job_id: str | None = None
    message: str = ""


@dataclass(frozen=True)
class Submitting:
    """How new jobs are made.

    Attributes:
        snapshot: the code that jobs run.
        max_running: the most jobs of the sweep that run at once; None: no limit.
    """

    provenance: Provenance
    profile: Profile
    snapshot: Path
    max_running: int | None


class SlurmBackend:
    """The jobs of one sweep.

    Args:
        tell: is told what happens.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        submitting: Submitting,
        slurm: SlurmCommands,
        tell: Callable[[Event], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._store = store
        self._plan = plan
        self._submitting = submitting
        self._slurm = slurm
        self._tell = tell
        self._clock = clock
        self._ledger = Ledger(store.root)
        self._whereabouts = Whereabouts(store, slurm, clock)
        self._pending = PendingJobs(lambda message: tell(Event("waiting", None, None, message)), clock)
        self._todo = set(plan.lacking(lambda stage_id: store.verify(stage_id).state == "done"))
        self._live: dict[str, Attempt] = {}
        # Causes of the attempts that ended while this launcher watched: what ended before it came counts no more.
        self._ended: dict[str, list[str]] = {}
        self._completed_since: dict[str, float] = {}
        # Attempts whose jobs would never have started: cancelled by us, and why.
        self._given_up: dict[str, End] = {}
        # Attempts whose jobs Slurm took from here without saying their ids.
        self._nameless: set[str] = set()
        # Names of jobs that had been missing when this launcher started: how they ended counts as before it.
        self._inherited: set[str] = set()
        self._held_up = False

    @property
    def jobs(self) -> Jobs:
        """What the last round saw, by job id."""
        return self._whereabouts.jobs

    def start(self) -> None:
        """Take up what earlier launchers left, then submit what is missing."""
        self._take_up()
        self._ended.clear()
        self._inherited = {each.intent.job_name for each in self._live.values() if self._whereabouts.is_missing(each)}
        self._submit_missing()

    def follow(self, show: Callable[[], object], sleep: Callable[[float], None] = time.sleep) -> None:
        """Go on until every stage is done, or failed for good.

        Args:
            show: called after every round.
        """
        self._follow_while(lambda: bool(self._live) or self._held_up, show, sleep)

    def follow_missing(self, show: Callable[[], object], sleep: Callable[[float], None] = time.sleep) -> None:
        """Go on until it is known of every job whether it is over, for at most some minutes."""
        deadline = self._clock() + 2 * GONE_AFTER_S
        self._follow_while(lambda: self._is_any_missing() and self._clock() < deadline, show, sleep)

    def _is_any_missing(self) -> bool:
        missing = [each for each in self._live.values() if self._whereabouts.is_missing(each)]
        return any(not self._is_foreign(attempt) for attempt in missing)

    def _follow_while(
        self, goes_on: Callable[[], bool], show: Callable[[], object], sleep: Callable[[float], None]
    ) -> None:
        wait = SHORTEST_WAIT_S
        while goes_on():
            sleep(wait)
            before = (len(self._todo), sorted(self._live))
            try:
                self.step()
            except SlurmUnavailableError as error:
                self._tell(Event("waiting", None, None, f"Slurm does not answer ({error}); jobs go on meanwhile"))
            changed = before != (len(self._todo), sorted(self._live))
            wait = SHORTEST_WAIT_S if changed else min(LONGEST_WAIT_S, wait * 1.5)
            show()

    def unsubmitted(self) -> list[Stage]:
        """Missing stages without a job: refused, claimed by somebody else, or for which the queue has no room."""
        return [stage for stage in self._plan.stages.values() if stage.id in self._todo - self._live.keys()]

    def step(self) -> None:
        """One round: see what has become of the jobs, submit what has become possible."""
        self._take_up()
        self._submit_missing()

    # What has become of the jobs.

    def _take_up(self) -> None:
        # The ledger is read before squeue: a job that is in it by then is in squeue, or over.
        for stage_id in self._todo - self._live.keys():
            attempt = self._ledger.last(stage_id)
            if attempt is not None and attempt.end is None:
                self._live[stage_id] = attempt
        job_ids = {stage_id: attempt.job_id for stage_id, attempt in self._live.items()}
        known = {job_id: self._live[stage_id] for stage_id, job_id in job_ids.items() if job_id is not None}
        self._whereabouts.look(known)
        sightings = {stage_id: self._whereabouts.sighting(self._live[stage_id]) for stage_id in job_ids}
        self._pending.note([sighting.job for sighting in sightings.values() if sighting.job is not None])
        for stage_id, attempt in list(self._live.items()):
            if job_ids[stage_id] is None:
                self._find(attempt)
            else:
                self._close_if_over(attempt, sightings[stage_id])

    def _find(self, attempt: Attempt) -> None:
        """A launcher wrote this intent and died before it wrote the job's id, or is about to write it."""
        stage = self._plan.stages[attempt.intent.stage_id]
        job = self._whereabouts.named(attempt.intent.job_name)
        if job is None:
            if self._is_foreign(attempt):
                return
            # Only who holds the claim may say that a submission came to nothing: its launcher may be at it.
            claim = try_claim(self._store.work(stage.id), ended_jobs=self._ledger.ended_jobs(stage.id))
            if isinstance(claim, Holder):
                return
            try:
                job_id = attempt.job_id
                job = next((job for job in self._slurm.jobs().values() if job.name == attempt.intent.job_name), None)
                if job is None and job_id is None and self._came_to_nothing(attempt):
                    self._close(stage, attempt, End("lost job", "the launcher died while it submitted", time.time()))
            finally:
                claim.release()
        if job is not None:
            attempt.record_job(job.job_id)
            self._tell(Event("adopted", stage, job.job_id))

    def _came_to_nothing(self, attempt: Attempt) -> bool:
        """Whether there is no job of an intent, for certain: that squeue does not list it is not enough."""
        if not (attempt.folder / SCRIPT).exists():
            return True  # the launcher died before sbatch
        if attempt.intent.stage_id in self._nameless and self._whereabouts.missing_for(attempt) < GONE_AFTER_S:
            return False
        self._slurm.cancel_named(attempt.intent.job_name)
        return True

    def _is_foreign(self, attempt: Attempt) -> bool:
        """Whether a job can't be seen from here; if so, say whose it is."""
        intent = attempt.intent
        if not (self._whereabouts.is_elsewhere(attempt) or self._whereabouts.is_somebody_elses(attempt)):
            return False
        message = (
            f"user {intent.user} submitted it on cluster {intent.cluster}; its artifact is waited for. Where that job "
            f"is gone for good, remove {attempt.folder}"
        )
        self._tell(Event("waiting", self._plan.stages[intent.stage_id], attempt.job_id, message))
        return True

    def _close_if_over(self, attempt: Attempt, sighting: Sighting) -> None:
        """Close an attempt whose job is over."""
        stage = self._plan.stages[attempt.intent.stage_id]
        job = sighting.job
        if job is not None and job.is_live:
            self._give_up_hopeless(stage, attempt, job)
        elif job is not None or self._store.verify(stage.id).state == "done":
            end = self._end(stage, attempt, job)
            if not self._may_lag(stage, job, end):
                self._close(stage, attempt, end)
        elif sighting.is_gone:
            self._close_gone(stage, attempt)
        else:
            self._tell_of_missing(stage, attempt)

    def _may_lag(self, stage: Stage, job: JobInfo | None, end: End) -> bool:
        """Whether the artifact of a job that has completed may still become visible here."""
        if job is None or job.state != "COMPLETED" or end.cause == "done":
            return False
        return self._clock() - self._completed_since.setdefault(stage.id, self._clock()) < LAG_S

    def _close_gone(self, stage: Stage, attempt: Attempt) -> None:
        """Close an attempt whose job nobody knows any more, unless its claim shows that it lives."""
        claim = try_claim(self._store.work(stage.id), ended_jobs=self._ledger.ended_jobs(stage.id))
        if isinstance(claim, Holder):
            self._tell_of_missing(stage, attempt)
            return
        try:
            end = self._end(stage, attempt, None)
            self._close(stage, attempt, end if end.state else replace(end, state=GONE))
        finally:
            claim.release()

    def _end(self, stage: Stage, attempt: Attempt, job: JobInfo | None) -> End:
        end = explain_end(self._store, stage, attempt, job)
        given_up = self._given_up.pop(stage.id, None)
        if given_up is None or end.cause == "done":
            return end
        return replace(end, cause=given_up.cause, message=given_up.message, bad_nodes=given_up.bad_nodes)

    def _tell_of_missing(self, stage: Stage, attempt: Attempt) -> None:
        if not self._is_foreign(attempt):
            message = (
                f"Slurm says nothing of it; it counts as gone after {GONE_AFTER_S / 60:.0f} min without a sign of life"
            )
            self._tell(Event("waiting", stage, attempt.job_id, message))

    def _give_up_hopeless(self, stage: Stage, attempt: Attempt, job: JobInfo) -> None:
        """Cancel a job that Slurm will never start; the next round finds it ended, and tries again."""
        cause = self._pending.hopeless(job)
        if cause is None or self._whereabouts.is_somebody_elses(attempt):
            return
        if stage.id not in self._given_up:
            self._given_up[stage.id] = self._given_up_for(cause, job)
        self._slurm.cancel([job.job_id])

    def _given_up_for(self, cause: str, job: JobInfo) -> End:
        nodes = self._slurm.launched_on(job.job_id) if cause == "bad node" else ""
        where = f" on {nodes}" if nodes else ""
        message = f"job {job.job_id} could not be started{where} and would have waited for ever: {job.reason}"
        is_one = bool(nodes) and not {"[", ","} & set(nodes)
        return End(cause, message, time.time(), bad_nodes=[nodes] if is_one else [])

    def _close(self, stage: Stage, attempt: Attempt, end: End) -> None:
        attempt.close(end)
        self._live.pop(stage.id, None)
        self._completed_since.pop(stage.id, None)
        self._nameless.discard(stage.id)
        if end.cause == "done":
            self._todo.discard(stage.id)
            self._store.discard_work(stage.id)  # for a job that died between its commit and its end
            self._tell(Event("done", stage, attempt.job_id, f"{end.run_seconds:.0f} s"))
            return
        if attempt.intent.job_name not in self._inherited:
            self._ended.setdefault(stage.id, []).append(end.cause)
        self._report_failure(stage, end)
        self._todo |= {need for need in stage.needs if self._store.verify(need).state != "done"}
        self._tell(Event("ended", stage, attempt.job_id, f"{end.cause}: {end.message}"))

    def _report_failure(self, stage: Stage, end: End) -> None:
        """Leave the cause where the report finds it, in place of what ranks said as they died."""
        work = self._store.work(stage.id)
        work.mkdir(parents=True, exist_ok=True)
        clear_failures(work)
        if end.cause not in NO_FAILURE:
            write_failure_record(work, Failure(end.cause, end.message, -1, end.at))

    # Submission.

    def _submit_missing(self) -> None:
        """Submit every stage that is missing and whose inputs are there or on their way, in plan order."""
        self._held_up = False
        for stage in self._plan.stages.values():
            try:
                try:
                    self._submit_if_possible(stage)
                except NeedEndedError:
                    # A long submission outlasts Slurm's memory of jobs that have ended (MinJobAge).
                    self._held_up = True
                    self._take_up()
                    self._submit_if_possible(stage)
            except NeedEndedError as error:
                self._tell(Event("waiting", stage, None, f"{error}; tried again"))
            except SubmitLimitError as error:
                self._held_up = True
                self._tell(Event("waiting", stage, None, f"{error}; the rest is submitted when jobs have ended"))
                return

    def _submit_if_possible(self, stage: Stage) -> None:
        if stage.id not in self._todo or stage.id in self._live or not self._may_try(stage):
            return
        pending = [need for need in stage.needs if need in self._todo and self._store.verify(need).state != "done"]
        needed = [self._live[need] for need in pending if need in self._live]
        # On a job of which Slurm may know nothing, nothing can depend.
        jobs = [attempt.job_id for attempt in needed if not self._whereabouts.is_missing(attempt)]
        after_ok = [job_id for job_id in jobs if job_id is not None]
        if len(after_ok) == len(pending):
            self._submit(stage, after_ok)

    def _may_try(self, stage: Stage) -> bool:
        ended = Counter(self._ended.get(stage.id, []))
        return all(count <= RETRIES.get(cause, 0) for cause, count in ended.items())

    def _submit(self, stage: Stage, after_ok: Sequence[str]) -> None:
        """Submit a stage, unless somebody else did or does."""
        claim = try_claim(self._store.work(stage.id), ended_jobs=self._ledger.ended_jobs(stage.id))
        if isinstance(claim, Holder):
            self._held_up = True
            return
        try:
            verdict = self._store.verify(stage.id)
            last = self._ledger.last(stage.id)
            if verdict.state == "done":
                self._todo.discard(stage.id)
                self._store.discard_work(stage.id)
            elif last is not None and last.end is None:
                self._live[stage.id] = last
            else:
                if verdict.state == "corrupt":
                    self._store.set_aside(stage.id)
                self._submit_claimed(stage, after_ok)
        finally:
            claim.release()

    def _submit_claimed(self, stage: Stage, after_ok: Sequence[str]) -> None:
        """Write-ahead, submit, record: a death between any two of these is mended by ``_find``."""
        submitting = self._submitting
        resources = submitting.profile.resources[stage.kind]
        slot, after_any = self._choose_slot(after_ok)
        attempt = self._ledger.open_attempt(
            stage, resources.gpus, resources.cores, resources.time_minutes, slot, **self._whereabouts.me
        )
        write_stage_file(self._store, stage, submitting.provenance, attempt.intent.number)
        request = Request(
            stage=stage,
            resources=resources,
            folder=attempt.folder,
            job_name=attempt.intent.job_name,
            snapshot=submitting.snapshot,
            threads=default_threads(resources, submitting.provenance.runtime.threads_per_rank),
            after_ok=after_ok,
            after_any=after_any,
            exclude=self._nodes_to_avoid(stage),
        )
        script = write_submission(request, attempt, self._store.root)
        # A job outlives this machine: so must what it reads, and what tells the next launcher of it.
        for folder in (attempt.folder, self._store.work(stage.id)):
            fsync_folders(folder, self._store.root)
        self._hand_over(stage, attempt, script)

    def _hand_over(self, stage: Stage, attempt: Attempt, script: Path) -> None:
        """Submit, and record the job's id or why there is none."""
        try:
            job_id = self._slurm.submit(script, attempt.intent.job_name)
        except SubmissionRefusedError as error:
            self._close(stage, attempt, End("refused", str(error), time.time()))
            return
        except (SubmitLimitError, NeedEndedError) as error:
            cause = QUEUE_FULL if isinstance(error, SubmitLimitError) else NEED_ENDED
            self._close(stage, attempt, End(cause, str(error), time.time()))
            raise
        except SlurmUnavailableError:
            self._live[stage.id] = attempt  # it may have arrived
            raise
        self._live[stage.id] = attempt
        if job_id is None:
            self._nameless.add(stage.id)
            self._tell(
                Event("waiting", stage, None, "Slurm took a job without saying its id; it is looked for by name")
            )
            return
        attempt.record_job(job_id)
        self._tell(Event("submitted", stage, job_id))

    def _choose_slot(self, after_ok: Sequence[str]) -> tuple[int | None, str | None]:
        """Which of ``max_running`` slots a job joins, and the job before it there.

        A job starts when the one before it in its slot is over, so Slurm keeps to the limit without a launcher.
        """
        limit = self._submitting.max_running
        if limit is None:
            return None, None
        last: dict[int, Attempt] = {}
        for attempt in sorted(self._live.values(), key=lambda attempt: attempt.intent.created):
            if attempt.intent.slot is not None:
                last[attempt.intent.slot] = attempt
        free = next((slot for slot in range(limit) if slot not in last), None)
        if free is not None:
            return free, None
        # Behind a job that has to be waited for anyway, else behind the one that was submitted first.
        slots = [slot for slot in last if slot < limit]
        slot = min(slots, key=lambda slot: (last[slot].job_id not in after_ok, last[slot].intent.created))
        return slot, last[slot].job_id

    def _nodes_to_avoid(self, stage: Stage) -> list[str]:
        ends = [end for attempt in self._ledger.attempts(stage.id) if (end := attempt.end) is not None]
        return sorted({node for end in ends[-EXCLUDING_ATTEMPTS:] for node in end.bad_nodes})
