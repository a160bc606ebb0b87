"""Pairs that share a row are trained on as if each were alone, also by a model whose layers differ."""

from contextlib import nullcontext

import pytest
import torch
from fine_tunings import make_task
from masking import write
from pretended_gpu import pretended_gpu
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm, packed_rows
from hfprune_dist.structures.kept import Kept
from hfprune_dist.training.trainer import add_lora


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_pairs_of_a_row_do_not_see_each_other(tmp_path, device):
    kept = Kept.of_all_layers({"neurons": [torch.arange(17), torch.arange(9)]})
    write(open_checkpoint(save_tiny(tmp_path / "dense", "llama", num_hidden_layers=2)), kept, tmp_path / "pruned")
    checkpoint = open_checkpoint(tmp_path / "pruned")
    pairs = [torch.arange(3, 20)[None], torch.arange(40, 51)[None], torch.arange(7, 9)[None]]
    positions = torch.cat([torch.arange(pair.shape[1]) for pair in pairs])[None]
    with torch.no_grad(), nullcontext() if device == "cpu" else pretended_gpu():
        model = load_causal_lm(checkpoint.path, torch.float32)
        add_lora(model, make_task(checkpoint))
        model.to(device)
        row, places = torch.cat(pairs, dim=1).to(device), positions.to(device)
        with packed_rows(positions, model.device):
            packed_BTV = model(input_ids=row, position_ids=places, use_cache=False).logits.cpu()
        without_BTV = model(input_ids=row, position_ids=places, use_cache=False).logits.cpu()  # transformers asks
        alone_BTV = torch.cat([model(input_ids=pair.to(device)).logits for pair in pairs], dim=1).cpu()
    torch.testing.assert_close(packed_BTV, alone_BTV, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(without_BTV, alone_BTV, rtol=1e-4, atol=1e-4)
