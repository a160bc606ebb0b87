"""The tools of a sweep's launcher, and what it remembers about the sweep's jobs from round to round."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hfprune_launch.slurm.attempts import JobAttempt
from hfprune_launch.slurm.commands import SlurmCommands
from hfprune_launch.slurm.job_info import JobInfo
from hfprune_launch.slurm.job_tracker import JobTracker
from hfprune_launch.slurm.slurm_stage import SlurmStage

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Stage

Jobs = Mapping[str, JobInfo]


@dataclass(frozen=True)
class Event:
    """A message for the user: what happened, to which stage, and in which job."""

    what: str
    stage: Stage | None
    job_id: str | None = None
    message: str = ""


class SweepJobs:
    """The jobs of one sweep, as one launcher knows them.

    Args:
        tell: called with every event.
        clock: seconds of a monotonic clock.

    Attributes:
        todo: ids of the stages that are missing.
        live: stage id -> its attempt without an end so far.
        without_id: ids of stages whose jobs Slurm accepted from this launcher without saying their ids.
    """

    def __init__(
        self,
        store: Store,
        plan: Plan,
        slurm: SlurmCommands,
        tell: Callable[[Event], None],
        clock: Callable[[], float],
    ) -> None:
        self.store = store
        self.plan = plan
        self.slurm = slurm
        self.tell = tell
        self.clock = clock
        self.tracker = JobTracker(store, slurm, clock)
        self.todo = set(plan.lacking(lambda stage_id: self.handle(stage_id).is_done()))
        self.live: dict[str, JobAttempt] = {}
        self.without_id: set[str] = set()

    def handle(self, stage_id: str) -> SlurmStage:
        return SlurmStage(self.store, stage_id)

    def stage_of(self, attempt: JobAttempt) -> Stage:
        return self.plan.stages[attempt.intent.stage_id]
