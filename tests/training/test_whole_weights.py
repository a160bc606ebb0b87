"""Frozen weights, whole on every rank or sharded over all: what is learnt, and how much is gathered for them."""

from functools import partial

import pytest
import torch
from families import save_model
from fine_tunings import ROWS, make_task, train
from gather_counter import SMALL_PARAMETER
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.kinds.memory import Placement
from hfprune_dist.training import trainer

# Every matrix of a layer has more elements than DeepSpeed leaves unsharded, head and embedding have fewer.
SHARDED = {"hidden_size": 320, "intermediate_size": 416, "num_key_value_heads": 4}


WAYS = {
    f"{whole}-{checkpointing}": Placement(whole == "whole", checkpointing == "checkpointed", fits=True)
    for whole in ("sharded", "whole")
    for checkpointing in ("plain", "checkpointed")
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ranks", "variant", "dtype"),
    [(1, "mixtral", "float32"), (2, "qwen2", "bfloat16"), (4, "llama-tied-biases", "float32")],
)
def test_all_learn_alike(monkeypatch, tmp_path, ranks, variant, dtype):
    compute = getattr(torch, dtype)
    save = partial(save_model, vocab_size=264) if variant == "mixtral" else partial(save_tiny, dtype=compute, **SHARDED)
    checkpoint = open_checkpoint(save(tmp_path / "model", variant))
    snapshots, counts = {}, {}
    for name, way in WAYS.items():
        if way.checkpointing and ranks != 2:
            continue
        monkeypatch.setattr(trainer, "place_training", lambda *_, way=way: way)
        snapshots[name], counts[name] = train(tmp_path / name, ranks, make_task(checkpoint, dtype=dtype, dropout=0.1))
    expected = snapshots["sharded-plain"]
    tolerance = 0.02 if dtype == "bfloat16" else 1e-4
    for name, snapshot in snapshots.items():
        losses = ([line["loss"] for line in it.losses] for it in (snapshot, expected))
        assert next(losses) == pytest.approx(next(losses), rel=tolerance), name
        for key, moved in snapshot.weights.items():
            same = expected.weights[key]
            assert (moved - same).norm() <= 5 * tolerance * same.norm() + 1e-6, (name, key)
    if (
        variant != "mixtral" and ranks > 1
    ):  # frozen weights are gathered for each micro-batch only where they are sharded
        frozen = sum(it.numel for it in checkpoint.tensors.values() if it.numel > SMALL_PARAMETER) * compute.itemsize
        last = {name: of_steps[2] - of_steps[1] for name, of_steps in counts.items()}
        assert last["whole-plain"] < frozen <= last["sharded-plain"] // (ROWS // ranks)
