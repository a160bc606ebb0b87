"""Ranks for tests: one in this process, or real ones, which run a stage that is laid out as the launcher does it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from fork_server import forked
from safetensors.torch import load

from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.distributed.world import World
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.store.stage import Stage

ROOT = Path(__file__).resolve().parents[1]
FAULTS = ROOT / "tests" / "faults"
CPU = torch.device("cpu")


def surroundings() -> dict[str, str]:
    """The environment. pytest sets a variable of it and removes it again, while tests in threads read it."""
    return {name: value for name in os.environ if (value := os.environ.get(name)) is not None}


class SoloWorld(World):
    """A world of one rank without a process group, or one of several ranks of which the others contribute nothing."""

    def __init__(self, rank=0, size=1, device=CPU):
        super().__init__(rank=rank, size=size, local_size=1, device=device)

    def on_rank0(self, work):
        return work()

    def broadcast(self, value, source=0):
        return value

    def all_gather(self, value):
        return [value]

    def broadcast_tensor(self, tensor, source):
        pass

    def all_reduce(self, tensor):
        pass

    def reduce(self, tensor, owner):
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
    store: Store,
    stage: Stage,
    ranks: int = 1,
    *,
    environment: dict[str, str] | None = None,
    interpreters: bool = False,
    **runtime: object,
) -> subprocess.CompletedProcess[str]:
    """Lay a stage out and run it to its end, as ``run_ranks`` does."""
    write_stage_file(store, stage, **runtime)
    return run_ranks(store, stage, ranks, environment=environment, interpreters=interpreters)


def run_ranks(
    store: Store,
    stage: Stage,
    ranks: int = 1,
    *,
    environment: dict[str, str] | None = None,
    interpreters: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run a stage that is already laid out to its end, with one thread per rank so that its bits can be compared.

    Args:
        interpreters: whether ranks are interpreters, several of them started by torchrun, rather than forks
            (fork_server.py).
    """
    launcher = _torchrun(ranks) if ranks > 1 else []
    script = ROOT / "launch" / "stage" / "run.py"
    command = [sys.executable, *launcher, str(script), str(store.root), stage.id]
    return subprocess.run(
        command if interpreters else forked(command),
        env={**surroundings(), "OMP_NUM_THREADS": "1", "RANK": "0", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def _torchrun(ranks: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]


def result_of(script: Path, ranks: int, *arguments: str) -> Any:
    """Return the JSON that a script prints after "result: " on one of the ranks on which torchrun runs it."""
    result = subprocess.run(
        forked([sys.executable, *_torchrun(ranks), str(script), *arguments]),
        env={**surroundings(), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "tests")},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("result: ")]
    assert lines, result.stderr[-3000:]
    return json.loads(lines[0].removeprefix("result: "))


def killing(rank: int | str, kill_at: int, match: str) -> dict[str, str]:
    """Return an environment in which a process dies before its ``kill_at``-th file operation on a matching path."""
    return {"PYTHONPATH": str(FAULTS), "KILL_RANK": str(rank), "KILL_AT": str(kill_at), "KILL_MATCH": match}


def killing_in_reduction(rank: int, kill_at: int) -> dict[str, str]:
    """Return an environment in which one rank dies before its ``kill_at``-th all-reduce."""
    return {"PYTHONPATH": str(FAULTS), "KILL_RANK": str(rank), "KILL_AT": str(kill_at)}


def failure_of(store: Store, stage: Stage) -> dict[str, object]:
    """Return the failure file that a stage left."""
    (file,) = store.work(stage.id).glob("failure.*.json")
    return dict(read_json(file))


def assert_close_files(found: Mapping[str, bytes], expected: Mapping[str, bytes]) -> None:
    """Check that files of tensors are equal up to rounding, as those of other numbers of ranks are."""
    assert found.keys() == expected.keys()
    for name, content in expected.items():
        tensors, theirs = load(found[name]), load(content)
        assert tensors.keys() == theirs.keys(), name
        for key, tensor in theirs.items():
            torch.testing.assert_close(tensors[key], tensor, rtol=1e-4, atol=1e-6)
