"""The stage that prunes during recovery, on real ranks: what it writes, and that no kill changes it."""

import json

import pytest
import torch
from made_stages import stage_of
from masking import kept_in
from ranks import finish, killing, metrics_of, run_stage
from tiny import save_tiny, write_pairs
from trained import assert_same_weights, weights_of
from transformers import AutoModelForCausalLM

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.checkpoints.lora_adapter import read_adapter
from hfprune_dist.checkpoints.write_pruned import staying
from hfprune_dist.planning.shapes import shape_for
from hfprune_dist.planning.target import Target
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input

STEPS = 5
RECOVERY = {"sequence_length": 320, "batch_size": 4, "max_steps": STEPS, "learning_rate": 1e-2, "rank": 4, "alpha": 8}
RECOVERY |= {"dtype": "float32"}
RUNTIME = {"collective_timeout_minutes": 1, "save_every_steps": 1}
SIZES = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    save_tiny(folder / "model", shard_size="60KB", dtype=torch.bfloat16, **SIZES)
    write_pairs(folder / "pairs.jsonl")
    return folder


def lay_out(source, root, *, steps=STEPS, **changes):
    params = {"recovery": RECOVERY | {"max_steps": steps}, "structures": ["neurons", "kv_groups"]}
    params |= {"protect_first": 1, "protect_last": 1}
    inputs = {"model": Input("model", str(source / "model")), "text": Input("pairs", str(source / "pairs.jsonl"))}
    return Store(root), stage_of("loraprune", "tiny", params | changes, inputs)


@pytest.fixture(scope="module")
def uninterrupted(source, tmp_path_factory):
    store, stage = lay_out(source, tmp_path_factory.mktemp("uninterrupted"))
    finish(store, stage, 2, **RUNTIME)
    return store, stage, store.handle(stage.id).artifact


@pytest.mark.slow
def test_what_is_left_is_the_plan_s_shape_of_the_trained_model(source, uninterrupted):
    store, stage, artifact = uninterrupted
    dense, kept = open_checkpoint(source / "model"), kept_in(artifact)
    shape = shape_for(Target.from_settings(dense, stage.params, stage.params.ratio, "tiny"))
    assert kept.shape == shape and shape.units["neurons"][0] > shape.units["neurons"][1]
    metrics = metrics_of(store, stage)
    assert metrics["ratio_reached"] == dense.parameter_counts.ratio(shape) == pytest.approx(0.2, abs=5e-3)
    assert metrics["parameters"] == open_checkpoint(artifact).parameters
    assert metrics["num_key_value_heads_by_layer"] == list(shape.units["kv_groups"])
    assert metrics["steps"] == len((artifact / "loss.jsonl").read_text().splitlines()) == STEPS

    adapter, stays, written = read_adapter(artifact / "adapter"), staying(dense, kept), weights_of(artifact)
    for name, weight in weights_of(source / "model").items():
        expected, cut = weight, stays[name][1]
        if name in adapter.factors:
            factor_a, factor_b = adapter.factors[name]
            expected = weight.float() + adapter.scale * (factor_b.float() @ factor_a.float())
        expected = (cut.apply(expected) if cut else expected).to(weight.dtype)
        assert torch.equal(written[name], expected), name
    model = AutoModelForCausalLM.from_pretrained(artifact, trust_remote_code=True)
    assert torch.isfinite(model(torch.arange(3, 23)[None]).logits).all()


@pytest.mark.slow
def test_a_killed_stage_goes_on_to_the_same_bits(source, uninterrupted, tmp_path):
    store, stage = lay_out(source, tmp_path)
    killed = run_stage(store, stage, 2, environment=killing(0, 6, "/snapshot."), **RUNTIME)
    assert killed.returncode != 0 and not store.handle(stage.id).artifact.exists()
    assert "step 1/" not in finish(store, stage, 2, **RUNTIME)
    artifact, expected = store.handle(stage.id).artifact, uninterrupted[-1]
    assert (artifact / "kept.json").read_text() == (expected / "kept.json").read_text()
    assert (artifact / "loss.jsonl").read_text() == (expected / "loss.jsonl").read_text()
    assert_same_weights(artifact, expected)


@pytest.mark.slow
def test_one_rank_and_one_step_are_enough_and_a_plain_shape_is_a_plain_checkpoint(source, tmp_path):
    store, stage = lay_out(source, tmp_path, steps=1, protect_first=0, protect_last=0, multiple_of=2, ratio=0.3)
    finish(store, stage, **RUNTIME)
    artifact = store.handle(stage.id).artifact
    checkpoint = open_checkpoint(artifact)
    assert checkpoint.is_plain and checkpoint.units.most < 48 and checkpoint.units.most % 2 == 0
    assert type(AutoModelForCausalLM.from_pretrained(artifact)).__name__ in ("LlamaForCausalLM", "MistralForCausalLM")
    assert json.loads((artifact / "loss.jsonl").read_text())["step"] == 1
