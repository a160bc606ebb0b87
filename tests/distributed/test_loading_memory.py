"""Memory that real ranks use while they load a sharded model, compared with the memory planned for it."""

from pathlib import Path

import pytest
from ranks import result_of
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint

pytestmark = pytest.mark.slow

# The embedding is the largest tensor; every matrix has more elements than DeepSpeed leaves unsharded.
SHAPE = {"hidden_size": 320, "intermediate_size": 832, "num_hidden_layers": 4, "vocab_size": 1200}


def taken(folder, ranks):
    """Return (peak, what stays after loading) of each rank's memory, in bytes."""
    return result_of(Path(__file__).with_name("load_sharded.py"), ranks, str(folder))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_takes_its_shards_and_few_tensors_and_the_first_has_the_files_mapped(tmp_path, ranks):
    """No rank reads the model into its own memory, and the host needs no memory for a model on GPUs."""
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", **SHAPE))
    whole = checkpoint.parameters * 4
    shards = whole / ranks
    largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4
    for rank, (peak, left) in enumerate(taken(checkpoint.path, ranks)):
        mapped = whole if rank == 0 else 0
        assert left == pytest.approx(shards, rel=0.02)
        assert 0.9 * largest < peak - mapped - shards < 3 * largest < whole / 4
