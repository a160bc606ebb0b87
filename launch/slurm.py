"""The Slurm backend: submits what is missing, adopts what runs, tries again what died by no fault of its own.

All it knows comes from files (artifacts, ledger, heartbeats) and one squeue call per round. So it may be closed at any
time: the jobs go on, and the next launcher takes up where this one stopped.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from hfprune_dist.artifacts import Store
from hfprune_dist.claims import Holder, try_claim
from hfprune_dist.files import fsync_folders
from hfprune_dist.plan import Plan, Stage
from hfprune_dist.progress import Failure, clear_failures, write_failure_record
from launch.causes import RETRIES, explain_end
from launch.layout import Origin, lay_out
from launch.ledger import QUEUE_FULL, Attempt, End, Ledger
from launch.profiles import Profile
from launch.slurm_cli import (
    JobInfo,
    SlurmCommands,
    SlurmUnavailableError,
    SubmissionRefusedError,
    SubmitLimitError,
)
from launch.submission import Request, default_threads, write_submission

Jobs = Mapping[str, JobInfo]
# Rounds in which Slurm may call a job completed before its artifact has to be visible here (file systems lag).
PATIENT_ROUNDS = 5
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 10.0
# The reason lies in another stage or outside: the stage itself has no failure to report.
NO_FAILURE = ("dependency", "duplicate", "lost job", QUEUE_FULL)
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

    origin: Origin
    profile: Profile
    snapshot: Path
    max_running: int | None


class SlurmBackend:
    """The jobs of one sweep.

    Args:
        tell: is told what happens.
    """

    def __init__(
        self, store: Store, plan: Plan, submitting: Submitting, slurm: SlurmCommands, tell: Callable[[Event], None]
    ) -> None:
        self._store = store
        self._plan = plan
        self._submitting = submitting
        self._slurm = slurm
        self._tell = tell
        self._ledger = Ledger(store.root)
        self._todo = set(plan.lacking(lambda stage_id: store.verify(stage_id).state == "done"))
        self._live: dict[str, Attempt] = {}
        # Causes of the attempts that ended while this launcher watched: what ended before it came counts no more.
        self._ended: dict[str, list[str]] = {}
        self._completed_rounds: Counter[str] = Counter()
        self._held_up = False
        self.jobs: Jobs = {}

    def start(self) -> None:
        """Take up what earlier launchers left, then submit what is missing."""
        self._take_up()
        self._ended.clear()
        self._submit_missing()

    def follow(self, show: Callable[[], object], sleep: Callable[[float], None] = time.sleep) -> None:
        """Go on until every stage is done, or failed for good.

        Args:
            show: called after every round.
        """
        wait = SHORTEST_WAIT_S
        while self._live or self._held_up:
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
        self.jobs = self._slurm.jobs()
        forgotten = [job_id for job_id in job_ids.values() if job_id is not None and job_id not in self.jobs]
        known = {**self._slurm.history(forgotten), **self.jobs}
        by_name = {job.name: job for job in self.jobs.values()}
        for stage_id, attempt in list(self._live.items()):
            job_id = job_ids[stage_id]
            if job_id is None:
                self._find(attempt, by_name)
            else:
                self._settle(attempt, known.get(job_id))

    def _find(self, attempt: Attempt, by_name: Jobs) -> None:
        """A launcher wrote this intent and died before it wrote the job's id, or is about to write it."""
        stage = self._plan.stages[attempt.intent.stage_id]
        job = by_name.get(attempt.intent.job_name)
        if job is None:
            # Only who holds the claim may say that a submission came to nothing: its launcher may be at it.
            claim = try_claim(self._store.work(stage.id), ended_jobs=self._ended_jobs(stage))
            if isinstance(claim, Holder):
                return
            try:
                job_id = attempt.job_id
                job = next((job for job in self._slurm.jobs().values() if job.name == attempt.intent.job_name), None)
                if job is None and job_id is None:
                    self._close(stage, attempt, End("lost job", "the launcher died while it submitted", time.time()))
            finally:
                claim.release()
        if job is not None:
            attempt.record_job(job.job_id)
            self._tell(Event("adopted", stage, job.job_id))

    def _settle(self, attempt: Attempt, job: JobInfo | None) -> None:
        """Close an attempt whose job is over."""
        stage = self._plan.stages[attempt.intent.stage_id]
        if job is not None and job.name != attempt.intent.job_name:
            job = None  # a cluster that was set up anew counts jobs from 1 again
        if job is not None and job.is_live:
            return
        end = explain_end(self._store, stage, attempt, job)
        self._completed_rounds[stage.id] += 1
        lags = job is not None and job.state == "COMPLETED" and end.cause != "done"
        if lags and self._completed_rounds[stage.id] <= PATIENT_ROUNDS:
            return
        self._close(stage, attempt, end)

    def _close(self, stage: Stage, attempt: Attempt, end: End) -> None:
        attempt.close(end)
        self._live.pop(stage.id, None)
        self._completed_rounds.pop(stage.id, None)
        if end.cause == "done":
            self._todo.discard(stage.id)
            self._store.discard_work(stage.id)  # for a job that died between its commit and its end
            self._tell(Event("done", stage, attempt.job_id, f"{end.run_seconds:.0f} s"))
            return
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
            if stage.id not in self._todo or stage.id in self._live or not self._may_try(stage):
                continue
            pending = [need for need in stage.needs if need in self._todo]
            jobs = [self._live[need].job_id for need in pending if need in self._live]
            after_ok = [job_id for job_id in jobs if job_id is not None]
            if len(after_ok) < len(pending):
                continue
            try:
                self._submit(stage, after_ok)
            except SubmitLimitError as error:
                self._held_up = True
                self._tell(Event("waiting", stage, None, f"{error}; the rest is submitted when jobs have ended"))
                return

    def _may_try(self, stage: Stage) -> bool:
        ended = Counter(self._ended.get(stage.id, []))
        return all(count <= RETRIES.get(cause, 0) for cause, count in ended.items())

    def _submit(self, stage: Stage, after_ok: Sequence[str]) -> None:
        """Submit a stage, unless somebody else did or does."""
        claim = try_claim(self._store.work(stage.id), ended_jobs=self._ended_jobs(stage))
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
        lane, after_any = self._choose_lane(after_ok)
        attempt = self._ledger.open_attempt(stage, resources.gpus, resources.cores, resources.time_minutes, lane)
        lay_out(self._store, stage, submitting.origin, attempt.intent.number)
        request = Request(
            stage=stage,
            resources=resources,
            folder=attempt.folder,
            job_name=attempt.intent.job_name,
            snapshot=submitting.snapshot,
            threads=default_threads(resources, submitting.origin.runtime.threads_per_rank),
            after_ok=after_ok,
            after_any=after_any,
            exclude=self._nodes_to_avoid(stage),
        )
        script = write_submission(request, attempt, self._store.root)
        # A job outlives this machine: so must what it reads, and what tells the next launcher of it.
        for folder in (attempt.folder, self._store.work(stage.id)):
            fsync_folders(folder, self._store.root)
        try:
            job_id = self._slurm.submit(script, attempt.intent.job_name)
        except SubmissionRefusedError as error:
            self._close(stage, attempt, End("refused", str(error), time.time()))
            return
        except SubmitLimitError as error:
            self._close(stage, attempt, End(QUEUE_FULL, str(error), time.time()))
            raise
        attempt.record_job(job_id)
        self._live[stage.id] = attempt
        self._tell(Event("submitted", stage, job_id))

    def _choose_lane(self, after_ok: Sequence[str]) -> tuple[int | None, str | None]:
        """Which of ``max_running`` lanes a job joins, and the job before it there.

        A job starts when the one before it in its lane is over, so Slurm keeps to the limit without a launcher.
        """
        limit = self._submitting.max_running
        if limit is None:
            return None, None
        last: dict[int, Attempt] = {}
        for attempt in sorted(self._live.values(), key=lambda attempt: attempt.intent.created):
            if attempt.intent.lane is not None:
                last[attempt.intent.lane] = attempt
        free = next((lane for lane in range(limit) if lane not in last), None)
        if free is not None:
            return free, None
        # Behind a job that has to be waited for anyway, else behind the one that was submitted first.
        lanes = [lane for lane in last if lane < limit]
        lane = min(lanes, key=lambda lane: (last[lane].job_id not in after_ok, last[lane].intent.created))
        return lane, last[lane].job_id

    def _nodes_to_avoid(self, stage: Stage) -> list[str]:
        ends = [attempt.end for attempt in self._ledger.attempts(stage.id)[-EXCLUDING_ATTEMPTS:]]
        return sorted({node for end in ends if end is not None for node in end.bad_nodes})

    def _ended_jobs(self, stage: Stage) -> list[str]:
        attempts = self._ledger.attempts(stage.id)
        return [attempt.job_id for attempt in attempts if attempt.end is not None and attempt.job_id is not None]


def cancel_jobs(plan: Plan, store: Store, slurm: SlurmCommands) -> list[str]:
    """Cancel every job of a sweep, whichever launcher submitted it; return their ids."""
    ledger = Ledger(store.root)
    last = [attempt for stage_id in plan.stages if (attempt := ledger.last(stage_id)) is not None]
    names = {attempt.intent.job_name for attempt in last if attempt.end is None}
    # Those that wait come first: they would start when the ones that they wait for are gone.
    found = [job for job in slurm.jobs().values() if job.name in names and job.is_live]
    job_ids = [job.job_id for job in sorted(found, key=lambda job: (job.state != "PENDING", job.job_id))]
    slurm.cancel(job_ids)
    return job_ids
