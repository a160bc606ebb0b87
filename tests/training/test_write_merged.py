"""Merging on several ranks: each writes files of its own, and what one of them can't write is told by all."""

from __future__ import annotations

import pytest
import torch
from ranks import SoloWorld
from tiny import save_tiny
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.training import Training
from hfprune_dist.errors import UserError
from hfprune_dist.stages.training import write_trained
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.training.snapshot import Snapshot


def told_of_merging(folder, dtype, factor_a, factor_b):
    """Merge an update of one weight on three ranks; return its name, and what the rank that refuses it says."""
    checkpoint = open_checkpoint(save_tiny(folder / "source", dtype=dtype, shard_size="20KB"))
    module = "model.layers.1.mlp.up_proj"
    neurons, hidden_size = checkpoint.tensors[f"{module}.weight"].shape
    factors = {"A": torch.full((1, hidden_size), factor_a), "B": torch.full((neurons, 1), factor_b)}
    parameters = {f"base_model.model.{module}.lora_{it}.default.weight": factor for it, factor in factors.items()}
    draft, settings = folder / "draft", Training(rank=1, alpha=1)
    draft.mkdir()
    shapes = {name: list(factor.shape) for name, factor in parameters.items()}
    whole = {"weights": torch.cat([factor.flatten() for factor in parameters.values()])}
    Snapshot(1, shapes=shapes).save(folder / "snapshot", whole, SoloWorld())
    trained = Snapshot.read(folder / "snapshot")
    with pytest.raises(UserError) as error:
        Ranks(3).run(lambda world: write_trained(checkpoint, trained, settings, draft, world, Progress(None)))
    assert len(checkpoint.weight_files) >= 3 and not (draft / "config.json").exists()
    return f"{module}.weight", str(error.value)


@pytest.mark.parametrize(
    ("dtype", "factor_a", "factor_b", "told"),
    [
        (torch.float16, 1.0, 1e5, "has values up to 100,"),
        (torch.bfloat16, 10.0, 1e38, "is NaN or infinite"),  # the loss of the last step was that of the weights before
    ],
)
def test_a_weight_that_can_not_be_written_is_told(tmp_path, dtype, factor_a, factor_b, told):
    name, message = told_of_merging(tmp_path, dtype, factor_a, factor_b)
    assert message.startswith(f"{tmp_path / 'source'}: the new {name} {told}") and "learning_rate" in message
