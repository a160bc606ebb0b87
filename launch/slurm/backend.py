"""The Slurm backend: submits missing stages, adopts running jobs, retries jobs that died through no fault of theirs.

All it knows comes from files (artifacts, records of attempts, heartbeats) and from Slurm: one squeue call per round,
and further calls only about jobs that squeue does not list. So it may be closed at any time: the jobs go on, and the
next launcher continues where this one stopped.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from hfprune_launch.slurm.commands import SlurmCommands, SlurmUnavailableError
from hfprune_launch.slurm.job_ends import JobEnds
from hfprune_launch.slurm.job_tracker import GONE_AFTER_S
from hfprune_launch.slurm.submission import Submission, Submitting
from hfprune_launch.slurm.sweep_jobs import Event, Jobs, SweepJobs

from hfprune_dist.errors import UserError
from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Stage

# Seconds between two squeues, and between two looks at what jobs have recorded.
SHORTEST_WAIT_S, LONGEST_WAIT_S = 1.0, 60.0
LOOK_S = 10.0
# For how long the store's file system may fail before a launcher gives up.
STORE_PATIENCE_S = 600.0
# A full or read-only disk, which stays so until somebody does something about it.
LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)


class SlurmBackend:
    """Runs a sweep to its end, or as far as it can get.

    Args:
        tell: called with every event.
        clock: seconds of a monotonic clock.
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
        """The jobs that the last round saw, by job id."""
        return self._jobs.tracker.jobs

    def start(self) -> None:
        """Take over what earlier launchers left, then submit missing stages."""
        self._ends.take_up_earlier()
        self._submission.tell_of_outdated()
        self._submission.submit_missing()

    def step(self) -> None:
        """Do one round: check on the jobs, and submit the stages that can now be submitted."""
        self._ends.take_up()
        self._submission.submit_missing()

    def follow(self, show: Callable[[], object], sleep: Callable[[float], None] = time.sleep) -> None:
        """Continue until every stage is done or has failed for good.

        Args:
            show: called after every round.
        """
        self._follow_while(lambda: bool(self._jobs.live) or self._submission.is_held_up, show, sleep)

    def follow_missing(self, show: Callable[[], object], sleep: Callable[[float], None] = time.sleep) -> None:
        """Continue until it is known for every job whether it is over, but for at most a few minutes."""
        clock = self._jobs.clock
        deadline = clock() + 2 * GONE_AFTER_S
        self._follow_while(lambda: self._is_any_missing() and clock() < deadline, show, sleep)

    def unsubmitted(self) -> list[Stage]:
        """Return missing stages without a job: refused, claimed by another launcher, or without room in the queue."""
        return self._submission.missing()

    def _is_any_missing(self) -> bool:
        return any(self._jobs.tracker.is_missing(attempt) for attempt in self._jobs.live.values())

    def _follow_while(
        self, goes_on: Callable[[], bool], show: Callable[[], object], sleep: Callable[[float], None]
    ) -> None:
        wait, clock = SHORTEST_WAIT_S, self._jobs.clock
        asked_at = answered_at = clock()
        while goes_on():
            sleep(min(wait, LOOK_S))
            before = self._reached()
            try:
                if clock() - asked_at >= wait or self._is_any_end_recorded():
                    asked_at, wait = clock(), min(LONGEST_WAIT_S, wait * 1.5)
                    self._step_if_answered()
                show()
                answered_at = clock()
            except (OSError, UserError) as error:
                if not _may_pass(error) or clock() - answered_at >= STORE_PATIENCE_S:
                    raise
                message = f"the store can't be read or written ({error}); jobs go on, and it is tried again"
                self._jobs.tell(Event("waiting", None, None, message))
            if self._reached() != before:
                wait = SHORTEST_WAIT_S

    def _step_if_answered(self) -> None:
        try:
            self.step()
        except SlurmUnavailableError as error:
            self._jobs.tell(Event("waiting", None, None, f"Slurm does not answer ({error}); jobs go on meanwhile"))

    def _is_any_end_recorded(self) -> bool:
        """Return whether the store says that a job is over, before Slurm is asked."""
        states = {stage_id: self._jobs.tracker.state_of(attempt).job for stage_id, attempt in self._jobs.live.items()}
        running = [stage_id for stage_id, job in states.items() if job is not None and not job.is_waiting]
        return any(self._jobs.live[it].exit_record() or self._jobs.handle(it).is_committed() for it in running)

    def _reached(self) -> tuple[int, list[str]]:
        """Return a value that changes when a job ends or is submitted."""
        return len(self._jobs.todo), sorted(self._jobs.live)


def _may_pass(error: Exception) -> bool:
    """Return whether an error is a file system's that may pass by itself, such as EIO, or EACCES without a ticket."""
    found = error if isinstance(error, OSError) else error.__context__  # a ``UserError`` about a file has it there
    return isinstance(found, OSError) and found.errno not in LASTING
