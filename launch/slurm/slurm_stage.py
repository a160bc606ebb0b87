"""Handle of a stage that runs in Slurm jobs, which also knows the attempts at the stage."""

from __future__ import annotations

from collections.abc import Collection

from hfprune_launch.slurm.attempts import Attempts, JobAttempt

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.claims import Claim, Holder, OpenClaim
from hfprune_dist.store.stage_handle import StageHandle


class SlurmStage(StageHandle):
    """A stage in a store, and the attempts to run it as a job."""

    def __init__(self, store: Store, id: str) -> None:
        super().__init__(store, id)
        self._attempts = Attempts(store.root)

    def attempts(self) -> list[JobAttempt]:
        """Return all attempts, first to last."""
        return self._attempts.of(self.id)

    def last_attempt(self) -> JobAttempt | None:
        """Return the newest attempt; None before the first."""
        return self._attempts.last(self.id)

    def open_attempt(self) -> JobAttempt | None:
        """Return the newest attempt if it has no end yet; its job may be waiting, running or over."""
        last = self.last_attempt()
        return last if last is not None and last.end is None else None

    def claim(self, job: str | None = None, ended_jobs: Collection[str] = ()) -> Claim | Holder:
        """As ``StageHandle.claim``; claims of jobs that are known to be over count as free."""
        return super().claim(job, {*ended_jobs, *self._attempts.ended_jobs(self.id)})

    def open_claim(self) -> OpenClaim | None:
        """As ``StageHandle.open_claim``, but None if held by a job that is over: its end is recorded elsewhere."""
        claim = super().open_claim()
        if claim is None or claim.holder.job is None:
            return claim
        return claim if claim.lives and claim.holder.job not in self._attempts.ended_jobs(self.id) else None
