"""Parameters that count are those that a loaded model computes with, whatever else is in the files."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from families import save_model
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import write
from safetensors.torch import load_file, save_file
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.structures.kept import Kept

JUNK = ("model.layers.0.self_attn.rotary_emb.inv_freq", "vision_tower.patch_embed.weight")


def count(model):
    return sum(parameter.numel() for parameter in {id(it): it for it in model.parameters()}.values())


def save(folder, variant, *, tied, head="as it is", layers_more=0, **options):
    """Write a checkpoint whose files hold more than its config.json describes, or something else."""
    save_tiny(folder, variant, tie_word_embeddings=tied, **options)
    file = folder / "model.safetensors"
    weights = load_file(file)
    embedding = weights["model.embed_tokens.weight"]
    if head != "as it is":
        weights["lm_head.weight"] = embedding.clone() if head == "same" else embedding.flip(0).contiguous()
    first = {name: weight for name, weight in weights.items() if ".layers.0." in name}
    for number in range(layers_more):
        beyond = f".layers.{options['num_hidden_layers'] + number}."
        weights |= {name.replace(".layers.0.", beyond): weight.clone() for name, weight in first.items()}
    save_file(weights | {name: torch.ones(5) for name in JUNK}, file, {"format": "pt"})
    return folder


@st.composite
def checkpoints(draw):
    return {
        "variant": draw(st.sampled_from(["llama", "llama-tied-biases", "mistral", "qwen2", "qwen3"])),
        "tied": draw(st.booleans()),
        "head": draw(st.sampled_from(["as it is", "same", "different"])),
        "layers_more": draw(st.integers(0, 2)),
        "num_hidden_layers": draw(st.integers(2, 3)),
        "intermediate_size": draw(st.integers(9, 40)),
    }


def prune(checkpoint, folder):
    """Keep each layer's first half, and return the ratio that is reported."""
    kept = Kept.of_all_layers({"neurons": [torch.arange(checkpoint.units.most // 2)] * checkpoint.num_layers})
    write(checkpoint, kept, folder)
    return checkpoint.parameter_counts.ratio(kept.shape)


@settings(max_examples=12)
@given(checkpoints())
def test_parameters_are_those_of_the_loaded_model_before_and_after_pruning(drawn):
    with TemporaryDirectory() as name:
        dense, pruned = Path(name) / "dense", Path(name) / "pruned"
        checkpoint = open_checkpoint(save(dense, **drawn))
        whole = AutoModelForCausalLM.from_pretrained(dense)
        assert checkpoint.parameters == count(whole)
        assert count(load_causal_lm(dense, torch.float32)) == count(whole)
        reached = prune(checkpoint, pruned)
        smaller = AutoModelForCausalLM.from_pretrained(pruned)
        assert open_checkpoint(pruned).parameters == count(smaller)
        assert 1 - count(smaller) / count(whole) == pytest.approx(reached, abs=1e-12)
        written = {name for file in pruned.glob("*.safetensors") for name in load_file(file)}
        assert written == {*open_checkpoint(pruned).tensors}, "what no model computes with isn't copied"
        assert torch.equal(smaller.lm_head.weight, whole.lm_head.weight)


@pytest.mark.parametrize("head", ["none", "same", "different"])
def test_a_head_that_config_json_does_not_mention_is_tied_unless_its_values_differ(tmp_path, head):
    """Configurations leave out what their class has by default; merged and gathered weights hold a copy of the head."""
    folder = save_model(tmp_path / "m", "gemma", tie_word_embeddings=True)
    config = json.loads((folder / "config.json").read_text())
    config.pop("tie_word_embeddings", None)
    (folder / "config.json").write_text(json.dumps(config))
    weights = load_file(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    copies = {"none": {}, "same": {"lm_head.weight": embedding.clone()}, "different": {"lm_head.weight": -embedding}}
    save_file(weights | copies[head], folder / "model.safetensors", {"format": "pt"})
    checkpoint, model = open_checkpoint(folder), load_causal_lm(folder, torch.float32)
    assert checkpoint.config["tie_word_embeddings"] == (head != "different")
    assert checkpoint.parameters == count(model)
    assert torch.equal(model.lm_head.weight, -embedding if head == "different" else embedding)
    pruned = tmp_path / "pruned"
    prune(checkpoint, pruned)
    assert open_checkpoint(pruned).parameters == count(AutoModelForCausalLM.from_pretrained(pruned))


def test_a_file_of_unused_tensors_alone_is_left_out(tmp_path):
    folder = save_tiny(tmp_path / "m", shard_size="20KB", num_hidden_layers=3)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    pruned = tmp_path / "pruned"
    prune(open_checkpoint(folder), pruned)
    index = json.loads((pruned / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == {file.name for file in pruned.glob("*.safetensors")}
    assert index["metadata"]["total_size"] == 4 * count(AutoModelForCausalLM.from_pretrained(pruned))
