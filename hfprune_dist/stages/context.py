"""What a stage is handed: its settings, inputs, ranks, folders, and the way to commit its artifact."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from hfprune_dist.artifacts import Store
from hfprune_dist.config import RuntimeConfig
from hfprune_dist.data.windows import load_windows
from hfprune_dist.errors import LostInputError
from hfprune_dist.parallel.interruption import Interruption
from hfprune_dist.parallel.world import World
from hfprune_dist.plan import Stage
from hfprune_dist.progress import Progress
from hfprune_dist.provenance import environment


@dataclass(frozen=True)
class Context:
    """One attempt at one stage, as seen from one rank.

    Attributes:
        config: the resolved configuration of the sweep, kept in the manifest.
        code: provenance of the code (commit, dirty diff), kept in the manifest.
        attempt: 1 for the first.
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
    interruption: Interruption = field(default_factory=Interruption)
    started: float = field(default_factory=time.time)

    @property
    def params(self) -> dict[str, Any]:
        return dict(self.stage.params)

    @property
    def work(self) -> Path:
        return self.store.work(self.stage.id)

    def has_input(self, role: str) -> bool:
        return role in self.stage.inputs

    def input_path(self, role: str) -> Path:
        """Where an input lies: a file or folder of the user's, or another stage's artifact."""
        source = self.stage.inputs[role]
        return self.store.path(source.location) if source.is_stage else Path(source.location)

    def calibration_windows(self) -> Tensor:
        """The windows that the scores of the role ``importance`` come from, int64 [samples, sequence_length]."""
        return load_windows(self.input_path("importance"))

    def check_inputs(self) -> None:
        """Verify every artifact that this stage reads, byte for byte (rank 0 reads, all ranks learn the verdict).

        Raises:
            LostInputError: naming the artifact; it has been set aside, so that the sweep makes it again.
        """
        problem = self.world.let_first(self._first_problem)
        if problem:
            raise LostInputError(problem)

    def _first_problem(self, after_each: Callable[[], None]) -> str | None:
        for stage_id in self.stage.needs:
            verdict = self.store.verify(stage_id, thorough=True, after_each=after_each)
            if verdict.state == "corrupt":
                aside = self.store.set_aside(stage_id)
                return f"{stage_id}: {verdict.reason}; set aside as {aside}; run the sweep again to make it anew"
            if verdict.state == "missing":
                return f"{stage_id}: {verdict.reason}; run the sweep again"
        return None

    def open_draft(self) -> Path:
        """The folder in which all ranks may write files of the artifact."""
        return self.world.broadcast(self.store.open_draft(self.stage.id) if self.world.is_first else Path())

    def commit(self, draft: Path, metrics: dict[str, Any]) -> None:
        """Publish the draft as this stage's artifact, once all ranks have written their files."""
        peak = self.world.peak_memory_bytes()
        self.world.barrier()
        record = self._record(metrics, peak)
        self.world.let_first(lambda after_each: self.store.commit(self.stage, draft, record, after_each))
        if self.world.is_first:
            self.store.discard_work(self.stage.id)
        self.world.barrier()

    def _record(self, metrics: dict[str, Any], peak_memory_bytes: int) -> dict[str, Any]:
        finished = time.time()
        return {
            "config": self.config,
            "metrics": metrics,
            "provenance": {**self.code, **environment()},
            "world_size": self.world.size,
            "device": self.world.device.type,
            "started": self.started,
            "finished": finished,
            "peak_memory_bytes": peak_memory_bytes,
            "wall_time_s": finished - self.started,
            "attempts": self.attempt,
        }
