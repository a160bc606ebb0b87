"""config.json says under transformers 4's names too what version 5 calls otherwise, and that changes nothing."""

import json

import pytest
import torch
from families import save_model
from families_masked import load, logits_of

from hfprune_dist.checkpoints.pruned_config import write_config


@pytest.mark.parametrize("model_type", ["llama", "gpt_neox", "gemma3_text", "qwen3_moe", "gemma3"])
def test_earlier_names_say_the_same_and_change_nothing(tmp_path, model_type):
    linear = {"rope_type": "linear", "factor": 2.0}
    changes = {"rope_parameters": {**linear, "rope_theta": 10000.0}} if model_type == "llama" else {}
    folder = save_model(tmp_path, model_type, **changes)
    before = load(folder)
    write_config(json.loads((folder / "config.json").read_text()), folder)
    after = load(folder)
    assert after.config.to_dict() == before.config.to_dict()
    assert torch.equal(logits_of(before), logits_of(after))

    written = json.loads((folder / "config.json").read_text())
    written = written.get("text_config", written)
    rope = dict(written.get("rope_parameters") or {})
    rope = rope.get("full_attention", rope)
    assert written.get("rope_theta", written.get("rotary_emb_base")) == rope.get("rope_theta"), "as engines read it"
    others = {"gemma3_text": ("rope_local_base_freq", 10000.0), "qwen3_moe": ("num_experts", 4)}
    others |= {"llama": ("rope_scaling", linear)}
    assert model_type not in others or others[model_type] in written.items()
