"""Section ``ranks``: the calibration pass with the whole model on one rank, and ZeRO-3 on two, one thread each."""

from __future__ import annotations

import hashlib
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from hfprune_launch.benchmark.measurement import call
from hfprune_launch.benchmark.scoring import read_windows

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.methods import CRITERIA
from hfprune_dist.structures.score_names import scores_of_layers

ONE_THREAD = {"OMP_NUM_THREADS": "1"}
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
SHARDS, SHARD_SIZE = 4, 2
DTYPE = "bfloat16"


def measure_ranks(model: str, text: str, tokens: int, rounds: int) -> list[tuple[str, float, str]]:
    """Measure the time for the same windows, and count how many different sums the runs give: what, value, unit."""
    where = {"model": model, "text": text, "tokens": tokens // 4, "shards": SHARDS}
    # Every rank needs a GPU of its own, and all compared runs need the same kind of device.
    device = {} if torch.cuda.device_count() >= 2 else {"CUDA_VISIBLE_DEVICES": ""}
    environment = {**ONE_THREAD, **device}
    seconds: list[float] = []
    sums = set()
    for _ in range(rounds):
        alone = call(f"{__name__}:score", where, {**environment, **ALONE})
        sharded = call(f"{__name__}:score", where, environment, ranks=2)
        seconds.append(sharded["seconds"] / alone["seconds"])
        sums |= {tuple(run["digests"]) for run in (alone, sharded)}
    return [
        (f"{DTYPE}: ZeRO-3 on 2 ranks, time for the same windows", statistics.median(seconds), "x 1 rank"),
        (f"{DTYPE}: different sums among all runs", len(sums), "(1: all have the same bits)"),
    ]


def score(model: str, text: str, tokens: int, shards: int) -> dict[str, Any]:
    """On every rank: return the seconds for all shards, and the digests of their sums in shard order."""
    from hfprune_dist.distributed.world import join_world
    from hfprune_dist.scoring.shard_scorer import ShardScorer

    world = join_world(os.environ, timeout_minutes=10, reproducible=True)
    windows_ST = read_windows(model, text, shards * SHARD_SIZE, tokens)
    scorer = ShardScorer(
        open_checkpoint(Path(model)),
        getattr(torch, DTYPE),
        windows_ST,
        [CRITERIA["entropy"]],
        seed=0,
        micro_batch_size=1,
        world=world,
        sharding="zero3" if world.size > 1 else "replicate",
    )
    scorer.score(_micro_batches(0))  # lets DeepSpeed learn the order of layers
    world.barrier()
    started = time.perf_counter()
    mine = {shard: scorer.score(_micro_batches(shard)) for shard in range(world.rank, shards, world.size)}
    world.barrier()
    seconds = time.perf_counter() - started
    entropy = {shard: torch.cat(scores_of_layers(sums, "entropy")) for shard, sums in mine.items()}
    digests = {shard: hashlib.sha256(it.numpy().tobytes()).hexdigest() for shard, it in entropy.items()}
    everybody = {shard: digest for share in world.all_gather(digests) for shard, digest in share.items()}
    return {"seconds": seconds, "digests": [everybody[shard] for shard in sorted(everybody)]}


def _micro_batches(shard: int) -> list[range]:
    first = shard * SHARD_SIZE
    return [range(window, window + 1) for window in range(first, first + SHARD_SIZE)]
