"""Pairs that share a row are trained on as if each were alone, whatever the model's layers look like."""

import pytest
import torch
from masking import write
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.training import RecoveryConfig
from hfprune_dist.data.schedule import Schedule
from hfprune_dist.structures.kept import Kept
from hfprune_dist.training.engine_setup import load_trainable_model
from hfprune_dist.training.fine_tuning import FineTuning


def task_of(folder):
    return FineTuning(
        checkpoint=open_checkpoint(folder),
        section="recovery",
        settings=RecoveryConfig(batch_size=1, rank=4, alpha=8, dtype="float32"),
        seed=0,
        rows=lambda row: {},
        distills=False,
        schedule=Schedule(1, 1, 0),
        total_steps=1,
        warmup_steps=0,
        save_every_steps=1,
        timeout_minutes=5,
        run_folder=folder / "run",
    )


def model_in(folder, layers):
    """Return a folder with a tiny model whose layers are alike, or differ."""
    dense = save_tiny(folder / "dense", "llama", num_hidden_layers=2)
    if layers == "alike":
        return dense
    kept = Kept.of_all_layers({"neurons": [torch.arange(17), torch.arange(9)]})
    write(open_checkpoint(dense), kept, folder / "pruned")
    return folder / "pruned"


@pytest.mark.parametrize("layers", ["alike", "different"])
def test_pairs_of_a_row_do_not_see_each_other(tmp_path, layers):
    model = load_trainable_model(task_of(model_in(tmp_path, layers))).eval()
    pairs = [torch.arange(3, 20)[None], torch.arange(40, 51)[None], torch.arange(7, 9)[None]]
    positions = torch.cat([torch.arange(it.shape[1]) for it in pairs])[None]
    with torch.no_grad():
        packed_BTV = model(input_ids=torch.cat(pairs, dim=1), position_ids=positions).logits
        alone_BTV = torch.cat([model(input_ids=it).logits for it in pairs], dim=1)
    torch.testing.assert_close(packed_BTV, alone_BTV, rtol=1e-4, atol=1e-4)
