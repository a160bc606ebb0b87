"""The Slurm backend: submits what is missing, adopts what runs, tries again what died by no fault of its own.

All it knows comes from files (artifacts, records of attempts, heartbeats) and from Slurm: one squeue call per round,
and more only about jobs that squeue does not list. So it may be closed at any time: the jobs go on, and the next
launcher takes up where this one stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from hfprune_launch.slurm.commands import SlurmCommands, SlurmUnavailableError
from hfprune_launch.slurm.job_ends import JobEnds
from hfprune_launch.slurm.submission import Submission, Submitting
from hfprune_launch.slurm.sweep_jobs import Event, Jobs, SweepJobs
from hfprune_launch.slurm.whereabouts import GONE_AFTER_S

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Stage

SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 10.0


class SlurmBackend:
    """Brings a sweep to its end, or as far as it goes.

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
        self._jobs = SweepJobs(store, plan, slurm, tell, clock)
        self._ends = JobEnds(self._jobs)
        self._submission = Submission(self._jobs, self._ends, submitting)

    @property
    def jobs(self) -> Jobs:
        """What the last round saw, by job id."""
        return self._jobs.whereabouts.jobs

    def start(self) -> None:
        """Take up what earlier launchers left, then submit what is missing."""
        self._ends.take_up_earlier()
        self._submission.submit_missing()

    def step(self) -> None:
        """One round: see what has become of the jobs, submit what has become possible."""
        self._ends.take_up()
        self._submission.submit_missing()

    def follow(self, show: Callable[[], object], sleep: Callable[[float], None] = time.sleep) -> None:
        """Go on until every stage is done, or failed for good.

        Args:
            show: called after every round.
        """
        self._follow_while(lambda: bool(self._jobs.live) or self._submission.is_held_up, show, sleep)

    def follow_missing(self, show: Callable[[], object], sleep: Callable[[float], None] = time.sleep) -> None:
        """Go on until it is known of every job whether it is over, for at most some minutes."""
        clock = self._jobs.clock
        deadline = clock() + 2 * GONE_AFTER_S
        self._follow_while(lambda: self._is_any_missing() and clock() < deadline, show, sleep)

    def unsubmitted(self) -> list[Stage]:
        """Missing stages without a job: refused, claimed by somebody else, or for which the queue has no room."""
        without_job = self._jobs.todo - self._jobs.live.keys()
        return [stage for stage in self._jobs.plan.stages.values() if stage.id in without_job]

    def _is_any_missing(self) -> bool:
        missing = [attempt for attempt in self._jobs.live.values() if self._jobs.is_missing(attempt)]
        return any(not self._jobs.is_foreign(attempt) for attempt in missing)

    def _follow_while(
        self, goes_on: Callable[[], bool], show: Callable[[], object], sleep: Callable[[float], None]
    ) -> None:
        wait = SHORTEST_WAIT_S
        while goes_on():
            sleep(wait)
            before = self._reached()
            try:
                self.step()
            except SlurmUnavailableError as error:
                message = f"Slurm does not answer ({error}); jobs go on meanwhile"
                self._jobs.tell(Event("waiting", None, None, message))
            wait = SHORTEST_WAIT_S if self._reached() != before else min(LONGEST_WAIT_S, wait * 1.5)
            show()

    def _reached(self) -> tuple[int, list[str]]:
        """What changes when a job ends or is submitted."""
        return len(self._jobs.todo), sorted(self._jobs.live)
