"""Handle of one stage in a store, by its id: its folders, its state, and the right to run it.

Code that asks about a stage, or runs it, does so through its handle. A handle keeps no state: each answer reflects the
file system at that moment.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hfprune_dist.store.claims import Claim, Holder, OpenClaim, open_claim, try_claim
from hfprune_dist.store.heartbeat import (
    Failure,
    Heartbeat,
    clear_failures,
    read_failure,
    read_failures,
    read_heartbeat,
    write_failure,
    write_failure_record,
)

if TYPE_CHECKING:
    from hfprune_dist.store.artifacts import Store, Verdict


class StageHandle:
    """A stage in a store.

    Args:
        id: ``<kind>/<fingerprint>``.
    """

    def __init__(self, store: Store, id: str) -> None:
        self.store = store
        self.id = id

    # Its artifact.

    @property
    def artifact(self) -> Path:
        """The folder of its artifact."""
        return self.store.path(self.id)

    def manifest(self) -> dict[str, Any] | None:
        """The manifest of its artifact; None if there is none. Does not verify the files."""
        return self.store.manifest(self.id)

    def is_committed(self) -> bool:
        """Whether it has an artifact, verified or not, whose files have not been removed to make room; cheap."""
        return self.store.is_committed(self.id)

    def verify(self, thorough: bool = False) -> Verdict:
        """Check its artifact against the manifest; see ``Store.verify``."""
        return self.store.verify(self.id, thorough)

    def is_done(self) -> bool:
        """Whether it has an artifact that passes verification, which is the only definition of success."""
        return self.verify().state == "done"

    def set_aside(self) -> Path | None:
        """Move a corrupt artifact to the quarantine; see ``Store.set_aside``."""
        return self.store.set_aside(self.id)

    def open_draft(self, claim: Claim | None = None) -> Path:
        """Create the folder in which its artifact is written; see ``Store.open_draft``."""
        return self.store.open_draft(self.id, claim)

    def discard_drafts(self, claim: Claim) -> None:
        """Remove the drafts of its artifact that were written under a claim."""
        self.store.discard_drafts(self.id, claim)

    def empty(self) -> None:
        """Remove the files of its artifact, except for the manifest; see ``Store.empty``."""
        self.store.empty(self.id)

    def discard(self) -> None:
        """Remove its artifact."""
        self.store.discard(self.id)

    # Its work folder, in which it runs.

    @property
    def work(self) -> Path:
        """The folder of its progress, which survives a crash and is removed once the artifact is committed."""
        return self.store.work(self.id)

    def claim(self, job: str | None = None, ended_jobs: Collection[str] = ()) -> Claim | Holder:
        """Claim the right to run it, or return the holder; creates the work folder. See ``try_claim``."""
        return try_claim(self.work, job, ended_jobs)

    def open_claim(self) -> OpenClaim | None:
        """The claim under which it runs, or ran when its launcher died; None if there is none. Claims nothing."""
        return open_claim(self.work)

    def claim_of(self, ticket: str) -> Claim:
        """The claim of the process that started this one, by its ticket."""
        return Claim.from_ticket(self.work, ticket)

    def heartbeat(self) -> Heartbeat | None:
        """The latest report of its progress; None if none can be read."""
        return read_heartbeat(self.work)

    def failures(self) -> list[Failure]:
        """All recorded reasons why it failed, the best explanation first."""
        return read_failures(self.work)

    def failure(self) -> Failure | None:
        """The best explanation of why it failed; None if no failure was recorded."""
        return read_failure(self.work)

    def report_failure(self, failure: Failure) -> None:
        """Record a failure where the report finds it."""
        write_failure_record(self.work, failure)

    def report_error(self, error: BaseException, rank: int, attempt: int | None) -> None:
        """Record why a rank failed, for the launcher."""
        write_failure(self.work, error, rank, attempt)

    def clear_failures(self) -> None:
        """Remove the failures and the heartbeat of earlier attempts."""
        clear_failures(self.work)

    def discard_progress(self) -> None:
        """Make the next attempt start over; see ``Store.discard_progress``."""
        self.store.discard_progress(self.id)

    def discard_work(self) -> None:
        """Remove its work folder, once its artifact is committed."""
        self.store.discard_work(self.id)

    def discard_leftovers(self) -> None:
        """Remove the work folder left by a process that died just after committing, if the stage is done."""
        if not self.work.is_dir() or isinstance(claim := self.claim(), Holder):
            return  # a process that has just committed is about to do the same
        try:
            if self.is_done():
                self.discard_work()
        finally:
            claim.release()
