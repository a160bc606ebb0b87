"""Merging on several ranks: each writes files of its own, and what one of them can't write is told by all."""

from __future__ import annotations

import pytest
import torch
from tiny import save_tiny
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.errors import UserError
from hfprune_dist.stages.training import write_merged
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.training.snapshot import Snapshot


def told_of_merging(folder, dtype, factor_a, factor_b):
    """Merge an update of one weight on three ranks; return its name, and what the rank that refuses it says."""
    checkpoint = open_checkpoint(save_tiny(folder / "source", dtype=dtype, shard_size="20KB"))
    module = "model.layers.1.mlp.up_proj"
    neurons, hidden_size = checkpoint.tensors[f"{module}.weight"].shape
    factors = {"A": torch.full((1, hidden_size), factor_a), "B": torch.full((neurons, 1), factor_b)}
    parameters = {f"base_model.model.{module}.lora_{it}.default.weight": factor for it, factor in factors.items()}
    draft, settings = folder / "draft", RecoveryConfig(rank=1, alpha=1)
    draft.mkdir()
    trained = Snapshot(1, parameters, [])
    with pytest.raises(UserError) as error:
        Ranks(3).run(lambda world: write_merged(checkpoint, trained, settings, draft, world, Progress(None)))
    assert len(checkpoint.weight_files) >= 3 and not (draft / "config.json").exists()
    return f"{module}.weight", str(error.value)


def test_a_weight_that_float16_cannot_hold_is_told(tmp_path):
    name, message = told_of_merging(tmp_path, torch.float16, 1.0, 1e5)
    assert message.startswith(f"{tmp_path / 'source'}: the new {name} has values up to 100,")
    assert message.endswith(", or lower the training's learning_rate")


@pytest.mark.parametrize(("factor_a", "factor_b"), [(10.0, 1e38), (1.0, float("nan"))])
def test_a_weight_that_training_lost_is_told(tmp_path, factor_a, factor_b):
    """The loss of the last step was still finite: it is that of the weights before the step."""
    name, message = told_of_merging(tmp_path, torch.bfloat16, factor_a, factor_b)
    assert message.startswith(f"{tmp_path / 'source'}: the new {name} is NaN or infinite")
    assert "learning_rate" in message
