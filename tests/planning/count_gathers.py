"""On each of torchrun's ranks, score micro-batches of a sharded model, and print what each of them gathered."""

import json
import os
import sys
from pathlib import Path

import torch
from gather_counter import counting_gathers

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.core.criteria import CRITERIA
from hfprune_dist.distributed.world import join_world
from hfprune_dist.scoring.shard_scorer import ShardScorer


def main(folder, criteria, structures, checkpointing):
    world = join_world(os.environ, timeout_minutes=2)
    windows = torch.arange(3, 3 + 4 * 16).reshape(4, 16)
    chosen = [CRITERIA[name] for name in criteria.split(",")]
    scorer = ShardScorer(
        open_checkpoint(Path(folder)),
        torch.bfloat16,
        windows,
        chosen,
        seed=0,
        micro_batch_size=1,
        world=world,
        structures=structures.split(","),
        activation_checkpointing=checkpointing == "checkpointed",
    )
    counts = []
    for window in range(4):
        with counting_gathers() as gathered:
            scorer.score([range(window, window + 1)])
        counts.append((gathered.calls, gathered.bytes))
    scorer.release()
    left = sum(parameter.ds_tensor.numel() for parameter in scorer.module.parameters())
    if world.is_first:
        print("result: " + json.dumps({"counts": counts, "left_of_shards": left}), flush=True)
    world.barrier()
    os._exit(0)


main(*sys.argv[1:])
