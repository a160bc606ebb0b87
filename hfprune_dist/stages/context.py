"""What a stage is handed: its settings, inputs, ranks, folders, and the way to commit its artifact."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

from torch import Tensor

from hfprune_dist.config.parameters import Parameters
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.data.windows import load_windows
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.distributed.world import TELL_EVERY_S, World
from hfprune_dist.errors import LostInputError, UserError
from hfprune_dist.planning.user_files import ChangedInputError, UserFiles
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.claims import Claim, ClaimLostError
from hfprune_dist.store.hashing import AfterEach, digest_of
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.provenance import environment
from hfprune_dist.store.stage import Stage
from hfprune_dist.store.stage_handle import StageHandle
from hfprune_dist.training.tracking import TrackedRun

TRACKING = "tracking"  # beside the store

T = TypeVar("T")
P = TypeVar("P", bound=Parameters)


@dataclass(frozen=True)
class Context(Generic[P]):
    """One attempt at one stage, as seen from one rank; ``P`` is the class of its settings.

    Attributes:
        config: the resolved configuration of the sweep, kept in the manifest.
        code: provenance of the code (version, commit, dirty diff), kept in the manifest.
        attempt: 1 for the first.
        claim: under which the stage runs, on rank 0; None where nobody claimed it.
        interruption: whether this attempt has been asked to end early.
        work: folder for progress inside the stage; survives a death and is found again by the next attempt.
    """

    stage: Stage
    store: Store
    world: World
    runtime: RuntimeConfig
    progress: Progress
    config: dict[str, Any]
    code: dict[str, Any]
    attempt: int
    claim: Claim | None = None
    interruption: Interruption = field(default_factory=Interruption)
    started: float = field(default_factory=time.time)

    @property
    def params(self) -> P:
        """The settings that the result depends on."""
        return cast("P", self.stage.params)

    @cached_property
    def handle(self) -> StageHandle:
        return self.store.handle(self.stage.id)

    @property
    def work(self) -> Path:
        return self.handle.work

    @property
    def tracked_run(self) -> TrackedRun:
        """What trackers know of the stage. The same stage in another store is another run."""
        return TrackedRun(
            report_to=self.runtime.report_to,
            project=self.runtime.tracking_project,
            title=f"{self.stage.label} {self.stage.kind}",
            digits=digest_of([self.stage.id, str(self.store.root.resolve())])[:16],
            attempt=self.attempt,
            folder=self.store.root.parent / TRACKING,
        )

    def has_input(self, role: str) -> bool:
        return role in self.stage.inputs

    def input_path(self, role: str) -> Path:
        """Where an input lies: a file or folder of the user's, or another stage's artifact."""
        source = self.stage.inputs[role]
        return self.store.handle(source.location).artifact if source.is_stage else Path(source.location)

    def calibration_windows(self) -> Tensor:
        """The windows that the scores of the role ``importance`` come from, int64 [samples, sequence_length]."""
        return load_windows(self.input_path("importance"))

    @cached_property
    def _user_files(self) -> UserFiles:
        return UserFiles(self.stage.inputs.values(), self.store.make_hashes)

    def check_inputs(self) -> None:
        """Verify everything that this stage reads, byte for byte (rank 0 reads, all ranks learn the verdict).

        Files of the user's whose size, times and inode are those of an earlier reading are not read again.

        Raises:
            LostInputError: naming the artifact; it has been set aside, so that the sweep makes it again.
            ChangedInputError: naming a file of the user's that is not what the sweep was planned with. What earlier
                attempts have made of it is deleted.
        """
        self._let_first(self._check_inputs)

    def _check_inputs(self, after_each: AfterEach) -> None:
        for stage_id in self.stage.needs:
            self._check_artifact(stage_id, after_each)
        self._discarding_progress(self._user_files.require_planned, after_each)

    def _check_artifact(self, stage_id: str, after_each: AfterEach) -> None:
        need = self.store.handle(stage_id)
        while (verdict := need.verify(thorough=True, after_each=after_each)).state == "corrupt":
            aside = need.set_aside(after_each)
            if aside is not None:
                raise LostInputError(
                    f"{stage_id}: {verdict.reason}; set aside as {aside}; run the sweep again to make it anew"
                )
        if verdict.state == "missing":
            raise LostInputError(f"{stage_id}: {verdict.reason}; run the sweep again")

    def require_untouched_inputs(self) -> None:
        """Check that no file of the user's has changed since ``check_inputs`` (a collective).

        To be called before anything is kept that others, or a later attempt, take for what the planned files lead to.

        Raises:
            ChangedInputError: naming the file. What this stage has made of it so far is deleted.
        """
        self._let_first(self._require_untouched_inputs)

    def _require_untouched_inputs(self, after_each: AfterEach) -> None:
        self._discarding_progress(self._user_files.require_untouched, after_each)

    def _discarding_progress(self, check: Callable[[AfterEach], None], after_each: AfterEach) -> None:
        """Check files; where they have changed, nobody knows which content the progress in the work folder is from."""
        try:
            check(after_each)
        except ChangedInputError:
            if self.claim is not None:
                self.claim.require_held()
            self.handle.discard_progress()
            raise

    def let_first_work(self, work: Callable[[], T]) -> T:
        """What ``work`` returns on rank 0, on every rank; collective.

        However long it takes, no rank waits longer than the collective timeout, since rank 0 tells the others that it
        goes on. Where ``work`` raises a ``UserError``, all ranks do.
        """
        return self._let_first(lambda after_each: _told(work, after_each))

    def open_draft(self) -> Path:
        """The folder in which all ranks may write files of the artifact."""
        return self._let_first(lambda _: self.handle.open_draft(self.claim))

    def commit(self, draft: Path, metrics: dict[str, Any]) -> None:
        """Publish the draft as this stage's artifact, once all ranks have written their files.

        Raises:
            ChangedInputError: where a file of the user's has changed meanwhile.
            ClaimLostError: where another process has claimed the stage meanwhile.
        """
        peak = self.world.peak_memory()
        self.world.barrier()
        record = self._record(metrics, peak)
        self._let_first(lambda after_each: self._commit(draft, record, after_each))
        self.world.barrier()

    def _commit(self, draft: Path, record: dict[str, Any], after_each: AfterEach) -> None:
        self._require_untouched_inputs(after_each)
        self.store.commit(self.stage, draft, record, after_each, claim=self.claim)
        self.handle.discard_work()

    def _let_first(self, action: Callable[[AfterEach], T]) -> T:
        """What an action of rank 0 returns, on every rank; where it ends the stage, all ranks leave in order."""

        def outcome(after_each: AfterEach) -> tuple[T | None, UserError | ClaimLostError | None]:
            try:
                return action(after_each), None
            except (UserError, ClaimLostError) as error:
                return None, error

        value, error = self.world.let_first(outcome)
        if error is not None:
            raise error
        return value  # type: ignore[return-value]

    def _record(self, metrics: dict[str, Any], peak_memory: Mapping[str, int | None]) -> dict[str, Any]:
        finished = time.time()
        return {
            "config": self.config,
            "metrics": metrics,
            "provenance": {**self.code, **environment()},
            "world_size": self.world.size,
            "device": self.world.device.type,
            "started": self.started,
            "finished": finished,
            **peak_memory,
            "wall_time_s": finished - self.started,
            "attempts": self.attempt,
        }


def _told(work: Callable[[], T], go_on: AfterEach) -> T:
    """What ``work`` returns, from a thread of its own; meanwhile ``go_on`` is called now and then."""
    pool = ThreadPoolExecutor(1)
    try:
        future = pool.submit(work)
        while not wait([future], TELL_EVERY_S).done:
            go_on()
        return future.result()
    finally:
        pool.shutdown(wait=False)
