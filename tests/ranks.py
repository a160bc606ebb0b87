"""Ranks for tests: one in this process, or real ones: a stage laid out as the launcher does, run with torchrun."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.distributed.world import World
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.store.stage import Stage

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "faults"


class SoloWorld(World):
    """A world of one rank on the CPU, without a process group; or one of several, whose others bring nothing."""

    def __init__(self, rank=0, size=1):
        super().__init__(rank=rank, size=size, local_rank=0, local_size=1, device=torch.device("cpu"))

    def broadcast(self, value, source=0):
        return value

    def gather(self, value):
        return [value]

    def broadcast_tensor(self, tensor, source):
        pass

    def add_up(self, tensor):
        pass


def write_stage_file(store: Store, stage: Stage, **runtime: object) -> None:
    work = store.work(stage.id)
    work.mkdir(parents=True, exist_ok=True)
    record = {
        "stage": stage.to_json(),
        "runtime": RuntimeConfig(**runtime).model_dump(),
        "config": {},
        "code": {},
        "attempt": 1,
    }
    write_json(work / "stage.json", record)


def run_stage(
    store: Store, stage: Stage, ranks: int = 1, *, environment: dict[str, str] | None = None, **runtime: object
) -> subprocess.CompletedProcess[str]:
    """Run a stage to its end, with one thread per rank so that its bits can be compared."""
    write_stage_file(store, stage, **runtime)
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
    return subprocess.run(
        [sys.executable, *torchrun, str(ROOT / "launch" / "stage" / "run.py"), str(store.root), stage.id],
        env={**os.environ, "OMP_NUM_THREADS": "1", "RANK": "0", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def killing(rank: int | str, kill_at: int, match: str) -> dict[str, str]:
    """Environment in which one process dies before its ``kill_at``-th file-system operation on a matching path."""
    return {"PYTHONPATH": str(FAULTS), "KILL_RANK": str(rank), "KILL_AT": str(kill_at), "KILL_MATCH": match}


def killing_in_reduction(rank: int, kill_at: int) -> dict[str, str]:
    """Environment in which one rank dies before its ``kill_at``-th all-reduce."""
    return {"PYTHONPATH": str(FAULTS), "KILL_RANK": str(rank), "KILL_AT": str(kill_at)}


def failure_of(store: Store, stage: Stage) -> dict[str, object]:
    """The failure file that a stage left."""
    (file,) = store.work(stage.id).glob("failure.*.json")
    return dict(read_json(file))
