"""Parameters that count are those that a loaded model computes with, whatever else is in the files."""

import json

import pytest
import torch
from families import save_model
from masking import write
from safetensors.torch import load_file, save_file
from tiny import edit_json, save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.structures.kept import Kept


def prune(checkpoint, folder):
    """Keep each layer's first half."""
    kept = Kept.of_all_layers({"neurons": [torch.arange(checkpoint.units.most // 2)] * checkpoint.num_layers})
    write(checkpoint, kept, folder)


@pytest.mark.parametrize("head", ["none", "same", "different"])
def test_a_head_that_config_json_does_not_mention_is_tied_unless_its_values_differ(tmp_path, head):
    """Configurations leave out what their class has by default; merged and gathered weights hold a copy of the head."""
    folder = save_model(tmp_path / "m", "gemma", tie_word_embeddings=True)
    edit_json(folder / "config.json", "tie_word_embeddings")
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    copies = {"none": {}, "same": {"lm_head.weight": embedding.clone()}, "different": {"lm_head.weight": -embedding}}
    save_file(weights | copies[head], folder / "model.safetensors", {"format": "pt"})
    checkpoint, model = open_checkpoint(folder), load_causal_lm(folder, torch.float32)
    assert checkpoint.config["tie_word_embeddings"] == (head != "different")
    assert checkpoint.parameters == model.num_parameters()
    assert torch.equal(model.lm_head.weight, -embedding if head == "different" else embedding)
    pruned = tmp_path / "pruned"
    prune(checkpoint, pruned)
    assert open_checkpoint(pruned).parameters == AutoModelForCausalLM.from_pretrained(pruned).num_parameters()


def test_a_file_of_unused_tensors_alone_is_left_out(tmp_path):
    folder = save_tiny(tmp_path / "m", shard_size="20KB", num_hidden_layers=3)
    edit_json(folder / "config.json", num_hidden_layers=1)
    pruned = tmp_path / "pruned"
    prune(open_checkpoint(folder), pruned)
    index = json.loads((pruned / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in pruned.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == 4 * AutoModelForCausalLM.from_pretrained(pruned).num_parameters()
