"""What the store and Slurm say about a sweep's stages."""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hfprune_launch.slurm.commands import FORGOTTEN, JobInfo, NoAnswerError, SlurmCommands, SlurmUnavailableError
from hfprune_launch.slurm.decide import StageState

from hfprune_dist.errors import UserError
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.attempts import Attempt, Cause, Ledger
from hfprune_dist.store.stage import Stage

PASSES = ("importance", "reference", "answers")  # kinds of work of a dense model alone, which its rows share


@dataclass
class Observer:
    """Looks at Slurm and at the store.

    What it remembers can be seen again: since when a job has been in its state, and which artifacts it has verified.

    Attributes:
        verified: ids of stages whose artifacts are not verified again.
        jobs: what the last look found out about jobs, by name; nothing of those about which Slurm did not answer.
        since: since when each of them has been in its state.
        before: number of the last attempt at each stage that ended before this command began, which tries anew.
    """

    ledger: Ledger
    slurm: SlurmCommands
    clock: Callable[[], float] = time.monotonic
    verified: set[str] = field(default_factory=set)
    jobs: dict[str, JobInfo] = field(default_factory=dict)
    since: dict[JobInfo, float] = field(default_factory=dict)
    before: dict[str, int] | None = None

    def look(self, attempts: Iterable[Attempt]) -> None:
        """Ask Slurm about the jobs of open attempts; the controller itself, then its accounting, about those that
        squeue does not list.

        A controller may say nothing of a job that it has forgotten, or may not show (PrivateData): one that had begun
        is then forgotten, too, which it is for good only if its stage's claim isn't renewed.
        """
        asked = list(attempts)
        self.jobs = self.slurm.jobs()
        for attempt in asked:
            name, job_id = attempt.intent.job_name, attempt.job_id
            if job_id is not None and name not in self.jobs:
                try:
                    says = self.slurm.fields(job_id)
                except NoAnswerError:
                    if not (state := self.slurm.accounted(job_id)) and not attempt.runs():
                        continue
                    says = {"JobState": state or FORGOTTEN, "Comment": name}
                except SlurmUnavailableError:
                    break
                if says.get("Comment") != name:  # ids are reused if a cluster was set up anew, names are not
                    says = {"JobState": FORGOTTEN}
                state, reason, nodes = (says.get(key, "") for key in ("JobState", "Reason", "NodeList"))
                self.jobs[name] = JobInfo(job_id, state, reason, nodes, says.get("JobName", ""), name)
        self.since = {job: self.since.get(job, self.clock()) for job in self.jobs.values()}

    def is_done(self, stage_id: str) -> bool:
        """Return whether a stage has a verified artifact; verifies each only once."""
        if stage_id not in self.verified and self.ledger.store.handle(stage_id).is_done():
            self.verified.add(stage_id)
        return stage_id in self.verified

    def states(self, plan: Plan) -> dict[str, StageState]:
        """Return the state of every stage, as the last look and the store show it, in plan order."""
        wanted, serves = set(plan.lacking(self.is_done)), served_by(plan)
        return {each.id: self._state(each, serves[each.id], each.id in wanted) for each in plan.stages.values()}

    def _state(self, stage: Stage, serves: frozenset[str], is_wanted: bool) -> StageState:
        attempt, before = self.ledger.open_job(stage.id), (self.before or {}).get(stage.id, 0)
        job = self.jobs.get(attempt.intent.job_name) if attempt is not None else None
        earlier = self.ledger.jobs_of(stage.id) if attempt is None and is_wanted else []
        ends = [end.cause for each in earlier if each.intent.number > before and (end := each.end) is not None]
        return StageState(
            stage.id,
            tuple(stage.needs),
            serves,
            is_wanted,
            self.is_done(stage.id),
            has_attempt=attempt is not None,
            has_id=attempt is not None and attempt.job_id is not None,
            job=job,
            lasts=self.clock() - self.since[job] if job is not None else 0.0,
            # One that was done and is wanted again has been found damaged, which is no failure of its own.
            ends=tuple(cause for cause in ends if cause != Cause.DONE),
        )


def served_by(plan: Plan) -> dict[str, frozenset[str]]:
    """Return ``StageState.serves`` of each stage; of one that no row needs, itself."""
    found: dict[str, set[str]] = {stage_id: set() for stage_id in plan.stages}
    for cell in plan.cells:
        for stage_id in plan.lacking(lambda _: False, cell.results):
            stage = plan.stages[stage_id]
            found[stage_id].add(cell.model if stage.kind in PASSES and not stage.needs else cell.label)
    return {stage_id: frozenset(serves or {stage_id}) for stage_id, serves in found.items()}


def stages_of_live_jobs(store: Store) -> list[str]:
    """Return the ids of stages whose jobs wait or run, or may be about to; raise UserError if Slurm can't say so."""
    ledger = Ledger(store)
    attempts = [each for each in ledger.open_jobs() if not store.handle(each.intent.stage_id).is_committed()]
    observer = Observer(ledger, SlurmCommands(retry_delays_s=()))
    try:
        if attempts:
            observer.look(attempts)
    except SlurmUnavailableError as error:
        folders = shlex.join(str(attempt.folder) for attempt in attempts)
        raise UserError(
            f"Slurm does not say whether jobs wait or run ({error}); run this where it does or, if they are gone for "
            f"good, rm -r {folders}"
        ) from None
    jobs = [(each, observer.jobs.get(each.intent.job_name)) for each in attempts]
    # One that has no id, and that Slurm does not list, was never submitted, unless its launcher still holds the claim.
    return [each.intent.stage_id for each, job in jobs if (job.is_live if job is not None else each.job_id)]
