"""The context of a running stage: its settings, inputs, ranks and folders, and how it commits its artifact."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
import transformers
from torch import Tensor

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.parameters import KINDS, Parameters
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.config.section import Dtype, PositiveOrAuto
from hfprune_dist.data.windows import load_windows
from hfprune_dist.distributed.frozen_model import passes_here
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.distributed.layer_check import check_layers
from hfprune_dist.distributed.world import World
from hfprune_dist.errors import LostInputError, UserError
from hfprune_dist.kinds.memory import Need, Passes, most_at_once
from hfprune_dist.planning.user_files import ChangedInputError, require_planned
from hfprune_dist.store.artifacts import StageHandle, Store
from hfprune_dist.store.atomic_files import listed, read_object, write_json
from hfprune_dist.store.attempts import Cause, Ledger
from hfprune_dist.store.claims import Claim
from hfprune_dist.store.hashing import digest_of
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.provenance import environment, releases
from hfprune_dist.store.stage import Stage

INPUTS = "inputs.json"  # in a work folder: the content of artifacts that progress there was made with

P = TypeVar("P", bound=Parameters, covariant=True)
T = TypeVar("T")


@dataclass(frozen=True)
class Context(Generic[P]):
    """One attempt at one stage, as seen from one rank; ``P`` is the class of its settings.

    Attributes:
        config: the resolved configuration of the sweep, kept in the manifest.
        code: provenance of the code (version, commit, dirty diff), kept in the manifest.
        attempt: number of this attempt, from 1.
        claim: the claim under which the stage runs; None on all ranks but the first.
        interruption: tells whether this attempt has been asked to end early.
        decided: what was decided by the machine's memory, kept in the manifest's metrics.
        began: when this attempt began, in seconds of the monotonic clock.
        work: folder for the stage's progress; it outlives a crash, and the next attempt resumes from it.
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
    decided: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    @property
    def params(self) -> P:
        """The settings that the result depends on."""
        return cast("P", self.stage.params)

    @cached_property
    def handle(self) -> StageHandle:
        return self.store.handle(self.stage.id)

    @property
    def _claim(self) -> Claim:
        assert self.claim is not None, "rank 0 alone opens drafts and commits"
        return self.claim

    @property
    def work(self) -> Path:
        return self.handle.work

    def has_input(self, role: str) -> bool:
        return role in self.stage.inputs

    def input_path(self, role: str) -> Path:
        """Path of an input: a file or folder of the user's, or another stage's artifact."""
        source = self.stage.inputs[role]
        return self.store.handle(source.location).artifact if source.is_stage else Path(source.location)

    def input_if_any(self, role: str) -> Path | None:
        """Path of an input; None if the stage has none in this role."""
        return self.input_path(role) if self.has_input(role) else None

    def reporting(self, phase: str, total: int) -> Callable[[int], None]:
        """A callback for a pass, which reports how many steps are done, and ends the stage if any rank was asked to."""

        def after_each(done: int) -> None:
            self.progress.update(phase, done, total)
            self.interruption.stop_if_agreed(self.world)

        return after_each

    def calibration_windows(self) -> Tensor:
        """The windows on which the scores of the ``importance`` input were made, int64 [samples, sequence_length]."""
        return load_windows(self.input_path("importance"))

    def passes(
        self, need: Callable[[int, int, int], Need], setting: PositiveOrAuto, windows_ST: Tensor, parts: int = 0
    ) -> Passes:
        """How windows pass a model here; collective.

        Args:
            need: of so many windows in all, of so many tokens, so many at once.
            parts: how many micro-batches ``auto`` leaves at least; 0: two for each rank.
        """
        samples, tokens = windows_ST.shape
        most = most_at_once(samples, tokens, parts or 2 * self.world.size)
        return passes_here(partial(need, samples, tokens), setting, most, self.runtime.sharding, self.world)

    def check_layers(self, checkpoint: Checkpoint, windows_ST: Tensor, dtype: Dtype) -> None:
        """``check_layers`` of the ``model`` input on a window, before passes layer by layer; collective."""
        given = windows_ST[0], getattr(torch, dtype), self.runtime.sharding, self.world
        self.once("checked", [dtype], partial(check_layers, checkpoint, *given))

    def once(self, name: str, given: list[Any], compute: Callable[[], T]) -> T:
        """``compute()``, a JSON value about the ``model`` input, unless this or another stage has done so; collective.

        The store remembers it for what else is ``given``, the kind of device and the libraries.
        """
        device = self.world.device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        versions = torch.__version__, transformers.__version__, [kind.version for kind in KINDS.values()]
        source = self.stage.inputs["model"]
        model = self._content_of(source.location) if source.is_stage else source.identity
        key = digest_of([model, *given, kind, *versions])[:20]
        file = self.store.root / "layers" / f"{name}-{key}.json"
        found: dict[str, Any] = self.world.on_rank0(lambda: read_object(file) or {})
        if name not in found:
            found[name] = compute()
            file.parent.mkdir(parents=True, exist_ok=True)
            self.world.on_rank0(lambda: write_json(file, found))
        return cast("T", found[name])

    def check_inputs(self) -> None:
        """Verify everything that this stage reads; rank 0 does.

        Artifacts are trusted if sizes and times of their files are as committed, and read byte by byte if an earlier
        attempt at this stage has failed. Files of the user's whose size, times and inode have not changed since an
        earlier reading are not read again. Progress made with an artifact that was made again since, and has another
        content (as it may on GPUs), is deleted.

        Raises:
            LostInputError: naming an artifact that is missing or corrupt (then set aside); the sweep makes it again.
            ChangedInputError: naming a file or folder of the user's that is not what the sweep was planned with.
                Progress that earlier attempts have made with it is deleted.
            UserError: if this Python has other releases of libraries than the launcher's.
        """

        def check() -> None:
            here = releases(self.stage.releases)
            if moved := [name for name, planned in self.stage.releases.items() if here.get(name) != planned]:
                planned = ", ".join(f"{name} {self.stage.releases[name]}" for name in moved)
                found = ", ".join(f"{name} {here.get(name)}" for name in moved)
                raise UserError(
                    f"{self.stage.id} was planned with {planned}, but {sys.executable} has {found}: "
                    "use one environment for the launcher and for stages"
                )
            ends = [end for _, end in Ledger(self.store).ends(self.stage.id) if end is not None]
            self.require_artifacts(thorough=any(end.cause not in (Cause.DONE, Cause.INTERRUPTED) for end in ends))
            for left in listed(self.work, "tmp*"):  # an engine's files, of an attempt that was killed
                shutil.rmtree(left, ignore_errors=True)
            self._discard_progress_with_other_artifacts()
            self.require_untouched_inputs("since the sweep was planned")

        self.world.on_rank0(check)

    def _discard_progress_with_other_artifacts(self) -> None:
        file, digests = self.work / INPUTS, {need: self._content_of(need) for need in self.stage.needs}
        known = read_object(file) or {}
        if any(known.get(stage_id, digest) != digest for stage_id, digest in digests.items()):
            self._claim.require_held()
            self.handle.discard_progress()
        if digests:
            write_json(file, known | digests)

    def _content_of(self, stage_id: str) -> str:
        """Digest of an artifact's files, which may be others if it was made again."""
        files = (self.store.handle(stage_id).manifest() or {}).get("files", {})
        return digest_of({name: entry["sha256"] for name, entry in files.items()})

    def require_artifacts(self, *, thorough: bool = False, lost: tuple[str, ...] = ("corrupt", "missing")) -> None:
        """Check the artifacts that this stage reads, on this rank.

        Raises:
            LostInputError: as ``check_inputs``, if one is ``lost``.
        """
        for stage_id in self.stage.needs:
            need = self.store.handle(stage_id)
            verdict = need.verify(thorough)
            if verdict.state == "corrupt":
                with need.claimed_briefly() as claim:
                    if claim is not None:  # otherwise it is being made anew
                        need.set_aside(claim)
            if verdict.state in lost:
                raise LostInputError(f"{stage_id}: {verdict.reason}; run the sweep again to make it anew")

    def require_untouched_inputs(self, when: str = "while a stage read it") -> None:
        """Check that the user's files are as planned still, and artifacts not damaged; on rank 0.

        Call it before keeping anything that others, or a later attempt, will take for the result of the planned files.

        Raises:
            ChangedInputError, LostInputError: naming the file or folder. Progress of this stage, which may come from
                either content, is deleted.
        """
        try:
            self.require_artifacts(lost=("corrupt",))  # who read one that is gone has noticed
            require_planned(self.stage.inputs.values(), Store(self.store.root).hashes, when)
        except (ChangedInputError, LostInputError):
            self._claim.require_held()
            self.handle.discard_progress()
            raise

    def open_draft(self) -> Path:
        """A folder in which all ranks may write files of the artifact."""
        return self.world.on_rank0(lambda: self.handle.open_draft(self._claim))

    def commit(self, draft: Path, metrics: dict[str, Any], earlier_s: float = 0.0) -> None:
        """Publish the draft as this stage's artifact, once all ranks have written their files.

        Args:
            earlier_s: seconds that earlier attempts have worked, as far as they are known.

        Raises:
            LostInputError, ChangedInputError: if what it reads has changed in the meantime.
            ClaimLostError: if another process has claimed the stage in the meantime.
        """
        peak = self.world.peak_memory()
        self.world.barrier()
        finished, seconds = time.time(), time.monotonic() - self.began
        record = {
            "config": self.config,
            "metrics": metrics | self.decided,
            "provenance": {**self.code, **environment()},
            "world_size": self.world.size,
            "device": self.world.device.type,
            "started": finished - seconds,
            "finished": finished,
            "peak_memory_bytes": peak,
            "wall_time_s": seconds + max(0.0, earlier_s),
            "attempts": self.attempt,
        }

        def publish() -> None:
            self.require_untouched_inputs()
            self.handle.commit(self.stage, draft, record, self._claim)
            self.handle.discard_work()

        self.world.on_rank0(publish)
