"""Run on each of torchrun's ranks: loads a sharded model and prints how much memory each rank used for that."""

import json
import os
import sys
from pathlib import Path

import torch
from peak_bytes import PeakBytes

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.distributed.frozen_model import FrozenModel
from hfprune_dist.distributed.world import join_world


def main(folder):
    world = join_world(os.environ, timeout_minutes=2)
    with PeakBytes() as counted:
        model = FrozenModel(open_checkpoint(Path(folder)), torch.float32, 1, "zero3", world)
    taken = world.all_gather((counted.peak, counted.live))
    model.release()
    if world.is_first:
        print("result: " + json.dumps(taken), flush=True)
    world.barrier()
    os._exit(0)


main(*sys.argv[1:])
