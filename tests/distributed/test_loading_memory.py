"""What each of some real ranks takes while it loads a sharded model, against what is planned for it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fork_server import forked
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.planning.dimensions import dimensions_of
from hfprune_dist.planning.footprint import Evaluate

pytestmark = pytest.mark.slow

# The embedding is the largest tensor; every matrix has more elements than DeepSpeed leaves unsharded.
SHAPE = {"hidden_size": 320, "intermediate_size": 832, "num_hidden_layers": 4, "vocab_size": 1200}


def taken(folder, ranks):
    """(peak, what is left of it) of each rank, in bytes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    result = subprocess.run(
        forked([*command, str(Path(__file__).with_name("load_sharded.py")), str(folder)]),
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    lines = [line for line in result.stdout.splitlines() if line.startswith("result: ")]
    assert lines, result.stderr[-3000:]
    return json.loads(lines[0].removeprefix("result: "))


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_a_rank_takes_its_shards_and_few_tensors_and_the_first_has_the_files_mapped(tmp_path, ranks):
    """So no rank reads the model into memory of its own, and the host needs none for those of a GPU."""
    checkpoint = open_checkpoint(save_tiny(tmp_path / "model", **SHAPE))
    dims, whole = dimensions_of(checkpoint.config), checkpoint.parameters * 4
    shards = Evaluate(1, 1, itemsize=4).memory(dims, ranks).weights
    largest = SHAPE["vocab_size"] * SHAPE["hidden_size"] * 4
    for rank, (peak, left) in enumerate(taken(checkpoint.path, ranks)):
        mapped = whole if rank == 0 else 0
        assert left == pytest.approx(shards, rel=0.02)
        assert 0.9 * largest < peak - mapped - shards < 3 * largest < whole / 4
