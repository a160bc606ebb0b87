"""Ranks for tests: one in this process, forks of it, or those of a stage that is laid out as the launcher does it."""

from __future__ import annotations

import datetime
import gc
import importlib
import os
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from hfprune_launch.local import backend, warm
from hfprune_launch.local.warm import WarmProcess
from hfprune_launch.stage.run import Provenance, leave_process, write_stage_file
from safetensors.torch import load

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.distributed.interruption import Interrupted, Interruption
from hfprune_dist.distributed.world import World
from hfprune_dist.stages.context import Context
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.store.stage import Stage

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "faults"
CPU = torch.device("cpu")
INTERRUPTED = 75
Environment = Mapping[str, str]


class Ended(NamedTuple):
    """How the ranks of a stage ended: the first exit code that isn't 0, and their output."""

    returncode: int
    output: str


def surroundings() -> dict[str, str]:
    """The environment. pytest sets a variable of it and removes it again, while tests in threads read it."""
    return {name: value for name in os.environ if (value := os.environ.get(name)) is not None}


class SoloWorld(World):
    """A world of one rank without a process group, or one of several ranks of which the others contribute nothing."""

    def __init__(self, size=1, device=CPU):
        super().__init__(rank=0, size=size, local_size=1, device=device)

    def broadcast(self, value):
        return value

    def all_gather(self, value):
        return [value]

    def broadcast_tensor(self, tensor, source):
        pass

    def all_reduce(self, tensor):
        pass

    def reduce(self, tensor, owner):
        pass


def run_stage(
    store: Store, stage: Stage, ranks: int = 1, *, environment: Environment | None = None, **runtime: object
) -> Ended:
    """Lay a stage out and run it to its end, with a thread per rank, so that bits compare."""
    write_stage_file(store.handle(stage.id), stage, Provenance(RuntimeConfig(**runtime), {}, {}), attempt=1)
    environment = {**surroundings(), "OMP_NUM_THREADS": "1", **(environment or {})}
    with tempfile.NamedTemporaryFile() as log, closing(WarmProcess()) as process:
        process.start(backend.RUN, [str(store.root), stage.id], ranks, environment, Path(log.name))
        codes = process.ended(600) or {}
        code = next(filter(None, codes.values()), 0 if codes else -signal.SIGKILL)
        return Ended(code, Path(log.name).read_text())


def finish(store: Store, stage: Stage, ranks: int = 1, **options: Any) -> str:
    """Run a stage that must succeed; return its ranks' output."""
    ended = run_stage(store, stage, ranks, **options)
    assert ended.returncode == 0, ended.output[-3000:]
    return ended.output


class Interrupting(Interruption):
    """Asks all ranks to end when they check for an interruption the ``at``-th time."""

    def __init__(self, at: int) -> None:
        super().__init__()
        self._at = at

    def agreed(self, world: World) -> bool:
        self._at -= 1
        return self._at == 0


def on_ranks(size: int, action: Callable[[World], None]) -> list[int]:
    """Run ``action`` on ranks that are forks; their exit codes: 0, INTERRUPTED, 1 for errors, or minus a signal."""
    with tempfile.TemporaryDirectory() as folder:

        def be_rank() -> None:
            torch.set_num_threads(1)  # the parent's thread pool did not survive the fork
            dist.init_process_group("gloo", timeout=datetime.timedelta(minutes=5))
            rank = dist.get_rank()
            try:
                action(World(rank, size, size, CPU))
            except Interrupted:
                Path(folder, str(rank)).touch()
            except BaseException:
                traceback.print_exc()
                leave_process(1)
            leave_process(0)

        gc.freeze()  # objects of this process are never collected by the forks, and so stay shared
        sys.stdout.flush()
        codes = warm.run_ranks(be_rank, size, surroundings())
        gc.unfreeze()
        left = {int(file.name): INTERRUPTED for file in Path(folder).iterdir()}
        return [{**codes, **left}.get(rank, -signal.SIGTERM) for rank in range(size)]


def run_here(
    store: Store,
    stage: Stage,
    world: World | None = None,
    interruption: Interruption | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Run a stage to its end on a rank of this process, by default the only one; return its metrics."""
    handle, world = store.handle(stage.id), world or SoloWorld()
    handle.work.mkdir(parents=True, exist_ok=True)
    claim = handle.claim("test") if world.is_first else None
    runtime, asked = RuntimeConfig(**settings), interruption or Interruption()
    context = Context(stage, store, world, runtime, Progress(None), {}, {}, 1, claim, asked)
    importlib.import_module(f"hfprune_dist.stages.{stage.kind}").run(context)
    return metrics_of(store, stage) if world.is_first else {}


def metrics_of(store: Store, stage: Stage) -> dict[str, Any]:
    metrics: dict[str, Any] = store.handle(stage.id).manifest()["metrics"]
    return metrics


def files_of(store: Store, stage: Stage) -> dict[str, bytes]:
    """The tensors of a stage's artifact, by the names of their files."""
    return {file.name: file.read_bytes() for file in store.handle(stage.id).artifact.glob("*.safetensors")}


def killing(rank: int | str, kill_at: int, match: str) -> dict[str, str]:
    """Return an environment in which a process dies before its ``kill_at``-th file operation on a matching path."""
    return {"PYTHONPATH": str(FAULTS), "KILL_RANK": str(rank), "KILL_AT": str(kill_at), "KILL_MATCH": match}


def killing_in_reduction(rank: int, kill_at: int) -> dict[str, str]:
    """Return an environment in which one rank dies before its ``kill_at``-th all-reduce."""
    return {"PYTHONPATH": str(FAULTS), "KILL_RANK": str(rank), "KILL_AT": str(kill_at)}


def assert_close_files(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    """Check that files of tensors are equal up to rounding, as those of other numbers of ranks are."""
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        tensors, theirs = load(found[name]), load(content)
        assert tensors.keys() == theirs.keys(), name
        for key, tensor in theirs.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-4, atol=1e-6)
