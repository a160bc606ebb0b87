"""Memory that real ranks use while they load a sharded model, compared with the memory planned for it."""

import json

import pytest
import torch
from peak_bytes import PeakBytes
from ranks import on_ranks
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.distributed.frozen_model import FrozenModel

pytestmark = pytest.mark.slow

# The embedding is the largest tensor; every matrix has more elements than DeepSpeed leaves unsharded.
SHAPE = {"hidden_size": 320, "intermediate_size": 832, "num_hidden_layers": 4, "vocab_size": 1200}
RANKS = 2


def taken(checkpoint, file):
    """Return (peak, what stays after loading) of each rank's memory, in bytes."""

    def load(world):
        with PeakBytes() as counted:
            model = FrozenModel(checkpoint, torch.float32, "zero3", world)
        everywhere = world.all_gather((counted.peak, counted.live))
        model.release()
        if world.is_first:
            file.write_text(json.dumps(everywhere))

    assert on_ranks(RANKS, load) == [0] * RANKS
    return json.loads(file.read_text())


def test_a_rank_takes_its_shards_and_few_tensors_and_the_first_has_the_files_mapped(tmp_path):
    """No rank reads the model into its own memory, and the host needs no memory for a model on GPUs."""
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", **SHAPE))
    whole = checkpoint.parameters * 4
    shards = whole / RANKS
    largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4
    for rank, (peak, left) in enumerate(taken(checkpoint, tmp_path / "taken")):
        mapped = whole if rank == 0 else 0
        assert left == pytest.approx(shards, rel=0.02)
        assert 0.9 * largest < peak - mapped - shards < 3 * largest < whole / 4
