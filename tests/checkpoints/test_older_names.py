"""config.json says under transformers 4's names too what version 5 calls otherwise, and that changes nothing."""

import json

import pytest
import torch
from families import save_model
from families_masked import load

from hfprune_dist.checkpoints.pruned_config import write_config

WINDOWS = torch.randint(3, 64, (2, 12), generator=torch.Generator().manual_seed(0))
# Names in transformers 5 -> in 4.
NAMES = {
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "partial_rotary_factor": ("partial_rotary_factor", "rotary_pct"),
}
# Architectures of transformers 4 whose kinds of layers have ropes of their own; all others are newer.
KINDS = ("gemma3", "gemma3_text", "olmo3")


@pytest.mark.parametrize(
    "model_type",
    ["llama", "phi3", "glm", "gpt_neox", "gemma3_text", "olmo3", "bamba", "stablelm", "qwen3_moe", "gemma3"],
)
def test_earlier_names_say_the_same_and_change_nothing(tmp_path, model_type):
    folder = save_model(tmp_path, model_type)
    before = load(folder)
    write_config(json.loads((folder / "config.json").read_text()), folder)
    after = load(folder)
    assert after.config.to_dict() == before.config.to_dict()
    with torch.no_grad():
        assert torch.equal(*(it(input_ids=WINDOWS, use_cache=False).logits for it in (before, after)))

    written = json.loads((folder / "config.json").read_text())
    written = written.get("text_config", written)
    rope = dict(written.get("rope_parameters") or {})
    if "full_attention" in rope:
        rope = dict(rope["full_attention"]) if model_type in KINDS else {}
    for key, names in NAMES.items():
        value = rope.pop(key, None)
        assert value is None or value in [written.get(it) for it in names] or (model_type, value) == ("phi3", 1.0), key
    assert rope in ({}, {"rope_type": "default"}, written.get("rope_scaling"))
    others = {"gemma3_text": ("rope_local_base_freq", 10000.0), "qwen3_moe": ("num_experts", 4)}
    if model_type in others:
        assert others[model_type] in written.items()
