"""Fine-tuning on random rows, by ranks that are forks."""

from __future__ import annotations

import json
import os
from pathlib import Path
from types import SimpleNamespace

import torch
from gather_counter import counting_gathers
from ranks import on_ranks

from hfprune_dist.checkpoints.checkpoint import Checkpoint
from hfprune_dist.config.schema import RuntimeConfig
from hfprune_dist.config.training import Training
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.distributed.interruption import Interruption
from hfprune_dist.distributed.world import World
from hfprune_dist.distributed.zero3 import init_deepspeed
from hfprune_dist.training.snapshot import Snapshot
from hfprune_dist.training.trainer import FineTuning, fine_tune

ROWS, TOKENS, STEPS = 8, 24, 3


def make_task(checkpoint: Checkpoint, **settings: object) -> FineTuning:
    ids_ST = torch.randint(3, 264, (ROWS, TOKENS), generator=torch.Generator().manual_seed(0))
    return FineTuning(
        checkpoint=checkpoint,
        settings=Training(batch_size=ROWS, rank=4, alpha=8, **{"learning_rate": 1e-3, **settings}),
        seed=0,
        rows=lambda row: {"input_ids": ids_ST[row], "labels": ids_ST[row].clone()},
        schedule=Schedule(ROWS, ROWS, 0),
        total_steps=STEPS,
    )


def train(folder: Path, ranks: int, task: FineTuning) -> tuple[Snapshot, list[int]]:
    """Return the last snapshot, and the bytes that had been gathered by the end of each step."""
    file = folder / "counts.json"

    folder.mkdir(exist_ok=True)

    def act(world: World) -> None:
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # nobody connects to this address any more
        init_deepspeed(world)
        counts: list[int] = []
        with counting_gathers() as gathered:
            noting = SimpleNamespace(update=lambda *_: counts.append(gathered.bytes))
            runtime = RuntimeConfig(collective_timeout_minutes=5, save_every_steps=1)
            fine_tune(task, world, runtime, noting, Interruption(), folder / "snapshot", folder / "run")
        if world.is_first:
            file.write_text(json.dumps(counts))

    assert on_ranks(ranks, act) == [0] * ranks
    return Snapshot.read(folder / "snapshot"), json.loads(file.read_text())
