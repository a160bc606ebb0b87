"""What travels along with pruned weights, and what stays as it was."""

import pytest
import torch
from masking import write
from tiny import edit_json, save_tiny
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.read_tensors import as_stored
from hfprune_dist.errors import UserError
from hfprune_dist.structures.kept import Kept

KEPT = [torch.tensor([0, 3, 4, 17, 40]), torch.tensor([1, 2, 30, 46, 47])]


def prune(source, target):
    checkpoint = open_checkpoint(source)
    write(checkpoint, Kept.of_all_layers({"neurons": KEPT}), target)
    return checkpoint


def test_other_tensors_and_dtype_are_untouched(tmp_path):
    source = prune(save_tiny(tmp_path / "dense", dtype=torch.bfloat16), tmp_path / "pruned")
    pruned = open_checkpoint(tmp_path / "pruned")
    assert set(pruned.tensors) == set(source.tensors)
    assert {info.dtype for info in pruned.tensors.values()} == {"BF16"}
    dense_state = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").state_dict()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").state_dict().items():
        if ".mlp." not in name:
            assert torch.equal(tensor, dense_state[name]), name


def test_licences_and_files_for_other_programs_travel_along_without_identifying_the_checkpoint(tmp_path):
    dense = save_tiny(tmp_path / "dense")
    before = open_checkpoint(dense).companion_files
    (dense / "additional_chat_templates").mkdir()
    for name in ("chat_template.jinja", "additional_chat_templates/tool_use.jinja"):
        (dense / name).write_text(f"{{{{ '{name}' }}}}")
    (dense / "tekken.json").write_text("{}")
    (dense / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass Own(PreTrainedTokenizerFast):\n    pass\n"
    )
    edit_json(dense / "tokenizer_config.json", auto_map={"AutoTokenizer": [None, "tokenization_own.Own"]})
    licences = ["COPYING", "LICENCE", "LICENSE", "License.txt", "MODEL_LICENSE", "Notice.md", "license-code"]
    for name in licences:
        (dense / name).write_text(name)
    prune(dense, tmp_path / "pruned")
    assert open_checkpoint(dense).companion_files == sorted([*before, "chat_template.jinja"])
    assert [name for name in licences if (tmp_path / "pruned" / name).read_text() == name] == licences
    templates = AutoTokenizer.from_pretrained(tmp_path / "pruned").chat_template
    assert set(templates) == {"default", "tool_use"}
    trusted = AutoTokenizer.from_pretrained(tmp_path / "pruned", trust_remote_code=True)
    assert type(trusted).__name__ == "Own" and (tmp_path / "pruned" / "tekken.json").is_file()


def test_infinite_numbers_in_a_config_stay(tmp_path):
    dense = save_tiny(tmp_path / "dense")
    edit_json(dense / "config.json", time_step_limit=[0.0, float("inf")])
    prune(dense, tmp_path / "pruned")
    assert '"time_step_limit": [\n  0.0,\n  Infinity\n ]' in (tmp_path / "pruned" / "config.json").read_text()
    assert AutoConfig.from_pretrained(tmp_path / "pruned").time_step_limit == [0.0, float("inf")]


def test_what_float16_cannot_hold_is_told_and_nothing_else(tmp_path):
    """65,520 is the smallest number that float16 rounds to infinity."""
    name = "model.layers.1.mlp.down_proj.weight"
    half = open_checkpoint(save_tiny(tmp_path / "half", dtype=torch.float16))
    whole = open_checkpoint(save_tiny(tmp_path / "whole"))
    for value in (float("inf"), float("nan"), 65519.0, 0.1):
        found = as_stored(half, name, torch.tensor([value], dtype=torch.float64), otherwise="")
        torch.testing.assert_close(found, torch.tensor([value]).half(), rtol=0, atol=0, equal_nan=True)
    for sign in (1, -1):
        with pytest.raises(UserError, match=rf"the new {name} has values up to 65,520, but float16, .* or do without"):
            as_stored(half, name, torch.tensor([1.0, sign * 65520.0, float("inf")]), otherwise="do without")
    assert as_stored(whole, name, torch.tensor([1e30]), otherwise="").isfinite().all()
    assert as_stored(half, "new.bias", torch.ones(3), like=name, otherwise="").dtype == torch.float16
