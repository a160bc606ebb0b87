"""Frozen weights, whole on every rank or sharded over all: what is learnt, and how much is gathered for them."""

import pytest
from fine_tunings import ROWS, make_task, train
from gather_counter import SMALL_PARAMETER
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.kinds.memory import Placement
from hfprune_dist.training import trainer

# Every matrix of a layer has more elements than DeepSpeed leaves unsharded, head and embedding have fewer.
SHARDED = {"hidden_size": 320, "intermediate_size": 416, "num_key_value_heads": 4}


WAYS = {"sharded": (False, False), "whole": (True, False), "whole, checkpointed": (True, True)}


@pytest.mark.slow
def test_all_learn_alike(monkeypatch, tmp_path):
    """Frozen weights are gathered for each micro-batch only where they are sharded."""
    ranks, checkpoint = 2, open_checkpoint(save_tiny(tmp_path / "model", "llama-tied-biases", **SHARDED))
    snapshots, gathered = {}, {}
    for name, way in WAYS.items():
        placement = Placement(*way, fits=True)
        monkeypatch.setattr(trainer, "place_training", lambda *_, placement=placement: placement)
        snapshots[name], counts = train(tmp_path / name, ranks, make_task(checkpoint, dtype="float32", dropout=0.1))
        gathered[name] = counts[2] - counts[1]
    expected = snapshots["sharded"]
    for name, snapshot in snapshots.items():
        losses = ([line["loss"] for line in it.losses] for it in (snapshot, expected))
        assert next(losses) == pytest.approx(next(losses), rel=1e-4), name
        for key, moved in snapshot.weights.items():
            same = expected.weights[key]
            assert (moved - same).norm() <= 5e-4 * same.norm() + 1e-6, (name, key)
    frozen = sum(it.bytes for it in checkpoint.tensors.values() if it.numel > SMALL_PARAMETER)
    assert gathered["whole"] < frozen <= gathered["sharded"] // (ROWS // ranks)
