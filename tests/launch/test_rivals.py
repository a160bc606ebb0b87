"""Rivals next to one of our methods: the same windows, one calibration pass, the same parameters removed, one table;
and, if every test is asked for, recovery of what has factors, and of what is pruned meanwhile.
"""

import shutil

import pytest
import torch
from hfprune_launch import sweep as sweep_command
from safetensors.torch import load_file
from sweeps import finish, in_process, make_inputs, results
from tiny import save_tiny
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm
from hfprune_dist.store.atomic_files import read_json

pytestmark = pytest.mark.slow

RIVALS = ["wanda-sp", "llm-pruner", "flap", "sdmprune", "lorap"]

NO_TASKS = ["--set", "evaluation.tasks=[]"]  # windows of held-out text go through the same models


def arguments(ranks, ratios="0.2", methods=("hfprune", *RIVALS)):
    models = ["--models", "alpha", "--ratios", ratios, "--methods", ",".join(methods)]
    return [*models, "--set", f"runtime.ranks={ranks}", "--set", "recovery.method=none", *NO_TASKS]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Inputs whose model has nine layers; llm-pruner protects the first and the last."""
    folder = tmp_path_factory.mktemp("inputs")
    file = make_inputs(folder)
    save_tiny(folder / "alpha", num_hidden_layers=9, num_attention_heads=8, num_key_value_heads=4)
    return file


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "out"
    finish(config, out, *arguments(1))
    return out


def test_rivals_share_a_calibration_pass_and_remove_as_much(finished):
    """One rival needs another pass, in its student."""
    passes = [read_json(folder / "manifest.json") for folder in (finished / "store" / "importance").iterdir()]
    assert sorted(manifest["stage"]["params"]["criteria"] == ["coupled_taylor_distilled"] for manifest in passes) == [
        False,
        True,
    ]
    rows = {row["method"]: row for row in results(finished)}
    assert set(rows) == {"", "hfprune", *RIVALS}
    biases = 2 * 9 * 32 / int(rows[""]["parameters"])  # which flap adds
    for name in RIVALS:
        expected = 0.2 - biases * (name == "flap")
        assert float(rows[name]["ratio_reached"]) == pytest.approx(expected, abs=2.5e-3)
        assert float(rows[name]["kl"]) > 0


@pytest.fixture(scope="module")
def recovered(config, finished, tmp_path_factory):
    """Recovery of what has factors, on two ranks, and of the method that prunes while it recovers. It starts from the
    artifacts of the sweep without recovery.
    """
    out = tmp_path_factory.mktemp("recovered") / "out"
    shutil.copytree(finished / "store", out / "store")
    methods = arguments(2, methods=("lorap", "loraprune"))
    finish(config, out, *methods, "--set", "recovery.method=lora", "--set", "recovery.max_steps=2")
    return out


def row_of(out, method):
    (row,) = [row for row in results(out) if row["method"] == method]
    return row


@pytest.mark.thorough
def test_recovery_trains_both_factors_and_keeps_the_shape(finished, recovered):
    folders = [out / row_of(out, "lorap")["checkpoint"] for out in (finished, recovered)]
    checkpoints = [open_checkpoint(folder) for folder in folders]
    assert checkpoints[0].ranks == checkpoints[1].ranks and checkpoints[0].parameters == checkpoints[1].parameters
    before, after = (load_file(folder / "model.safetensors") for folder in folders)
    changed = {name for name, weight in before.items() if not torch.equal(weight, after[name])}
    assert changed == {name for name in before if ".self_attn." in name or ".mlp." in name}
    assert any(name.endswith("q_proj.0.weight") for name in changed)
    remote = AutoModelForCausalLM.from_pretrained(folders[1], trust_remote_code=True, dtype=torch.float32)
    ids = torch.arange(3, 43)[None]
    with torch.no_grad():
        assert torch.equal(remote(ids).logits, load_causal_lm(folders[1], torch.float32)(ids).logits)


@pytest.mark.thorough
def test_loraprune_is_a_row_whose_recovery_is_its_own(recovered):
    dense, row = (row_of(recovered, name) for name in ("lorap", "loraprune"))
    assert (dense["recovery"], row["recovery"], row["criterion"]) == ("lora", "own", "")
    assert float(row["ratio_reached"]) == pytest.approx(0.2, abs=2e-3) and float(row["kl"]) > 0
    control = next(row for row in results(recovered) if row["recovery"] == "lora" and not row["method"])
    assert row["training_flops"] == control["training_flops"], "both train the dense model"
    folder = recovered / "checkpoints" / "alpha-0.2-loraprune"
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    widths = [layer.mlp.down_proj.in_features for layer in model.model.layers]
    assert widths[0] == widths[-1] == 48 > max(widths[1:-1]) == min(widths[1:-1])


def test_what_loraprune_can_not_do_is_refused(config, tmp_path):
    alone = ["--config", config, "--out", tmp_path / "out", "--models", "alpha", "--methods", "loraprune"]
    for setting, instead in {"method=none": "lora", "evaluate_every=1000": "null"}.items():
        code, _, said = in_process(sweep_command.main, *alone, "--ratios", "0.2", "--set", f"recovery.{setting}")
        told = " ".join(said.split())
        assert code == 2 and "--methods loraprune: units go while LoRA recovers the model" in told
        assert f"recovery.{setting.replace('=', ' is ')}; set it to {instead}" in told
