"""Merging on several ranks: each writes files of its own, and what one of them can't write is told by all."""

from __future__ import annotations

import pytest
import torch
from tiny import save_tiny
from worlds import Ranks

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.lora_adapter import write_adapter
from hfprune_dist.errors import UserError
from hfprune_dist.store.heartbeat import Progress
from hfprune_dist.training.write_merged import ADAPTER, write_merged


def test_a_weight_that_float16_cannot_hold_is_told_on_all_ranks(tmp_path):
    checkpoint = open_checkpoint(save_tiny(tmp_path / "source", dtype=torch.float16, shard_size="20KB"))
    module = "model.layers.1.mlp.up_proj"
    neurons, hidden_size = checkpoint.tensors[f"{module}.weight"].shape
    factors = {"A": torch.ones(1, hidden_size), "B": torch.full((neurons, 1), 1e5)}
    parameters = {f"base_model.model.{module}.lora_{it}.default.weight": factor for it, factor in factors.items()}
    draft = tmp_path / "draft"
    draft.mkdir()
    write_adapter(draft / ADAPTER, parameters, ["up_proj"], rank=1, alpha=1)

    def told(world):
        with pytest.raises(UserError) as error:
            write_merged(checkpoint, draft, world, Progress(None))
        return str(error.value)

    first, *others = Ranks(3).run(told)
    assert first.startswith(f"{tmp_path / 'source'}: the new {module}.weight has values up to 100,")
    assert first.endswith(", or lower the training's learning_rate") and others == [first] * 2
    assert len(checkpoint.weight_files) >= 3 and not (draft / "config.json").exists()
