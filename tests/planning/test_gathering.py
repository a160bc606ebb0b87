"""What two real ranks gather, against the estimate of it."""

from pathlib import Path

import pytest
import torch
from gather_counter import SMALL_PARAMETER
from ranks import result_of
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.planning import gathering
from hfprune_dist.planning.dimensions import dimensions_of
from hfprune_dist.planning.importance_footprint import Importance

pytestmark = pytest.mark.slow

# Every matrix has more elements than DeepSpeed leaves unsharded.
SHARDED = {
    "hidden_size": 320,
    "intermediate_size": 416,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "vocab_size": 400,
}


def counts(folder, criteria="entropy", structures="neurons", checkpointing="plain"):
    script = Path(__file__).with_name("count_gathers.py")
    found = result_of(script, 2, str(folder), criteria, structures, checkpointing)
    assert found["left_of_shards"] == 0, "released"
    return found["counts"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("traffic") / "model", dtype=torch.bfloat16, **SHARDED)


def test_matrices_are_large_enough_to_be_sharded(folder):
    matrices = [info.numel for info in open_checkpoint(folder).tensors.values() if len(info.shape) == 2]
    assert min(matrices) > SMALL_PARAMETER


@pytest.mark.parametrize(
    ("criteria", "losses", "structures"),
    [("entropy", 1, "neurons"), ("entropy,fisher", 2, "neurons"), ("entropy,fisher", 2, "neurons,kv_groups")],
)
def test_gathers_of_a_micro_batch(monkeypatch, folder, criteria, losses, structures):
    shape = dimensions_of(open_checkpoint(folder).config)
    job = Importance(1, 16, losses, kv_groups="kv_groups" in structures)
    learning, *later = counts(folder, criteria, structures)
    # While DeepSpeed learns the order of layers: every matrix for forward and for each backward, the head once.
    monkeypatch.setattr(gathering, "LIVE_PARAMETERS", 0)
    assert learning[1] == pytest.approx(job.work(shape).gathered_bytes, rel=0.002)
    # Then it gathers ahead, and a model this small stays gathered: each matrix once, those of the body together.
    monkeypatch.undo()
    for calls, gathered in later:
        assert gathered == pytest.approx(job.work(shape).gathered_bytes, rel=0.002)
        assert calls == 2


@pytest.mark.parametrize(("criteria", "losses"), [("entropy", 1), ("entropy,fisher", 2)])
def test_checkpointed_activations_gather_more_but_no_more_than_is_reckoned_with(folder, criteria, losses):
    shape = dimensions_of(open_checkpoint(folder).config)
    *_, (_, gathered) = counts(folder, criteria, checkpointing="checkpointed")
    plain, most = (Importance(1, 16, losses, checkpointing=on).work(shape).gathered_bytes for on in (False, True))
    assert plain < gathered <= most
