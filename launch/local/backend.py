"""The local backend: one stage at a time, on ranks of this machine."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from hfprune_launch.local.deaths import explain_death
from hfprune_launch.local.hardware import ranks_here, threads_of_a_rank
from hfprune_launch.stage.attempts import DONE, Attempt, End, Intent, Ledger, local_log
from hfprune_launch.stage.stage_file import Provenance, write_stage_file
from hfprune_launch.stage.stage_state import Outcome
from hfprune_launch.stage.warm import Ranks, WarmProcess

from hfprune_dist.config.parameters import KINDS
from hfprune_dist.results.formats import counted
from hfprune_dist.store.artifacts import StageHandle, Store
from hfprune_dist.store.cancellation import Cancellation
from hfprune_dist.store.claims import Claim, ClaimLostError, Holder, keep_renewed
from hfprune_dist.store.file_system import unwritable
from hfprune_dist.store.heartbeat import Failure, Heartbeat
from hfprune_dist.store.stage import Stage

RUN = "hfprune_launch.stage.run:main"
POLL_S = 0.1
CANCELLATION_POLL_S = 1.0

OnHeartbeat = Callable[[Heartbeat | None], None]


class LocalBackend:
    """Runs stages on this machine, on ranks of a process that goes on until ``close``.

    Args:
        logs: folder that receives one log per stage and attempt.
        cancellation: tells whether stages are still wanted.
    """

    def __init__(self, store: Store, logs: Path, provenance: Provenance, cancellation: Cancellation) -> None:
        self._store = store
        self._logs = logs
        self._provenance = provenance
        self._cancellation = cancellation
        self._warm = WarmProcess()
        self.ranks = ranks_here(provenance.runtime)

    def close(self) -> None:
        """End the process that starts ranks."""
        self._warm.close()

    def run(self, stage: Stage, on_heartbeat: OnHeartbeat) -> Outcome:
        """Claim a stage, run it on all ranks, and return how it ended; only a verified artifact counts as success.

        Raises:
            KeyboardInterrupt: if another command has cancelled the sweep.
        """
        began, handle = time.monotonic(), self._store.handle(stage.id)
        claim = self._claim(handle, on_heartbeat)
        try:
            self._require_wanted()
            if handle.is_done():  # another sweep was faster
                return Outcome("done", time.monotonic() - began)
            attempt = Ledger(self._store).begin(stage, ranks=self._ranks_of(stage))
            write_stage_file(handle, stage, self._provenance, attempt.intent.number)
            failure = self._run(stage, attempt, claim, on_heartbeat)
        finally:
            claim.release()
        return Outcome("failed" if failure else "done", time.monotonic() - began, failure)

    def _run(self, stage: Stage, attempt: Attempt, claim: Claim, on_heartbeat: OnHeartbeat) -> Failure | None:
        """Run a stage on all ranks, record how it ended, and return why it failed."""
        handle, log = self._store.handle(stage.id), local_log(self._logs, attempt.intent)
        self._logs.mkdir(parents=True, exist_ok=True)
        failure: Failure | None = Failure("interrupted", "the launcher was interrupted", -1, time.time())
        try:
            codes = self._watch(self._start(stage, claim, log), handle, claim, on_heartbeat)
            failure = None if handle.is_done() else self._failure(handle, claim, codes, log, attempt.intent)
        except ClaimLostError as lost:
            failure = None if handle.is_done() else Failure("duplicate", str(lost), -1, time.time())
        finally:
            end = End(DONE, "", time.time()) if failure is None else End(failure.cause, failure.message, time.time())
            with contextlib.suppress(OSError):  # a full disk has no room for it
                attempt.close(end)
        return failure

    def _claim(self, handle: StageHandle, on_heartbeat: OnHeartbeat) -> Claim:
        """Claim a stage once no other sweep works on it, showing its progress until then."""
        while isinstance(claim := handle.claim(), Holder):
            self._require_wanted()
            on_heartbeat(handle.heartbeat())
            time.sleep(POLL_S)
        return claim

    def _require_wanted(self) -> None:
        if self._cancellation.is_requested():
            raise KeyboardInterrupt("cancelled by another command; run the same command again to go on")

    def _ranks_of(self, stage: Stage) -> int:
        return 1 if KINDS[stage.kind].on_one_rank else self.ranks

    def _start(self, stage: Stage, claim: Claim, log: Path) -> Ranks:
        ranks = self._ranks_of(stage)
        # Ranks of this machine share its cores, and write their logs at once.
        threads = threads_of_a_rank(self._provenance.runtime, ranks)
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        arguments = [str(self._store.root.resolve()), stage.id, "--claim", claim.ticket]
        with log.open("wb") as stream:
            now = time.strftime("%Y-%m-%d %H:%M:%S%z")
            stream.write(f"{now} {stage.kind} {stage.label} ({stage.id}) on {counted(ranks, 'rank')}\n".encode())
            stream.flush()
            return self._warm.start(RUN, arguments, ranks, environment, stream)

    def _watch(self, ranks: Ranks, handle: StageHandle, claim: Claim, on_heartbeat: OnHeartbeat) -> Mapping[int, int]:
        """Wait until all ranks have ended and return their exit codes; end them if this is interrupted, cancelled or
        loses its claim.
        """
        looked_at, _ = time.monotonic(), keep_renewed(claim)
        try:
            while not ranks.ended(POLL_S):
                on_heartbeat(handle.heartbeat())
                if time.monotonic() - looked_at > CANCELLATION_POLL_S:
                    looked_at = time.monotonic()
                    with contextlib.suppress(OSError):  # the store doesn't answer at this moment
                        self._require_wanted()
                        if not handle.is_committed():  # after which the claim goes with the work folder
                            claim.require_held()
        except BaseException:
            self.close()  # which is faster than to wait for imports
            ranks.end()
            handle.discard_drafts(claim)
            raise
        return ranks.codes

    def _failure(
        self, handle: StageHandle, claim: Claim, codes: Mapping[int, int], log: Path, attempt: Intent
    ) -> Failure:
        """Return why the ranks left no artifact.

        Raises:
            ClaimLostError: if another process has since claimed the stage and uses its work folder.
        """
        said = (failure for failure in handle.failures() if failure.attempt == attempt.number)
        recorded = next(said, None)
        full = unwritable(self._store.root)  # which may have no room for a rank to record its own reason
        left = recorded or (Failure("input", full, -1, time.time()) if full else None)
        handle.discard_drafts(claim)  # makes room for what is written below
        claim.require_held()
        failure = explain_death(left, codes, log, attempt.number)
        if failure is not recorded:
            handle.clear_failures()
            handle.report_failure(failure)
        return failure
