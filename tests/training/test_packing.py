"""Pairs that share a row are trained on as if each were alone, also by a model whose layers differ."""

import torch
from fine_tunings import make_task
from masking import write
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm, packed_rows
from hfprune_dist.structures.kept import Kept
from hfprune_dist.training.trainer import add_lora


def test_pairs_of_a_row_do_not_see_each_other(tmp_path):
    kept = Kept.of_all_layers({"neurons": [torch.arange(17), torch.arange(9)]})
    write(open_checkpoint(save_tiny(tmp_path / "dense", "llama", num_hidden_layers=2)), kept, tmp_path / "pruned")
    checkpoint = open_checkpoint(tmp_path / "pruned")
    model = load_causal_lm(checkpoint.path, torch.float32)
    add_lora(model, make_task(checkpoint))
    pairs = [torch.arange(3, 20)[None], torch.arange(40, 51)[None], torch.arange(7, 9)[None]]
    positions = torch.cat([torch.arange(it.shape[1]) for it in pairs])[None]
    with torch.no_grad():
        with packed_rows(positions, positions.device):
            packed_BTV = model(input_ids=torch.cat(pairs, dim=1), position_ids=positions, use_cache=False).logits
        alone_BTV = torch.cat([model(input_ids=it).logits for it in pairs], dim=1)
    torch.testing.assert_close(packed_BTV, alone_BTV, rtol=1e-4, atol=1e-4)
