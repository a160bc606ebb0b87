"""A real pretrained model, from its checkpoint to the table."""

import json

import pytest
import torch
from ranks import ROOT
from safetensors.torch import load_file
from sweeps import finish, results
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow

SETTINGS = {
    "models": "[llama]",
    "ratios": "[0.2]",
    "methods": "[hfprune]",
    "calibration.samples": "2",
    "calibration.shard_size": "1",
    "calibration.sequence_length": "64",
    "calibration.mixture": "null",
    "recovery.sequence_length": "64",
    "recovery.batch_size": "1",
    "recovery.micro_batch_size": "1",
    "recovery.max_steps": "2",
    "evaluation.tasks": "[demo_continuation]",
    "evaluation.limit": "4",
    "evaluation.fidelity.windows": "3",
    "evaluation.fidelity.sequence_length": "128",
    "evaluation.fidelity.texts": "null",
    "efficiency.batch_sizes": "[1]",
    "efficiency.new_tokens": "2",
    "efficiency.repeats": "1",
    "runtime.ranks": "1",
}


@pytest.fixture(scope="module")
def finished(real_assets, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "out"
    places = {
        "aliases.llama.path": real_assets / "llama",
        "calibration.path": real_assets / "text" / "calibration.jsonl",
        "recovery.path": real_assets / "instructions.jsonl",
        "evaluation.include_path": real_assets / "tasks",
        "evaluation.fidelity.path": real_assets / "text" / "heldout.jsonl",
    }
    assignments = [f"--set={key}={value}" for key, value in (SETTINGS | places).items()]
    finish(ROOT / "configs" / "demo.yaml", out, *assignments)
    return out


def test_the_table_tells_a_pretrained_model_from_a_pruned_one(finished):
    dense, control, pruned = results(finished)
    assert 10 < float(dense["perplexity"]) < 30, "English, read by a pretrained model"
    assert float(pruned["perplexity"]) > 1.1 * float(dense["perplexity"])
    assert float(dense["kl"]) == 0 < float(control["kl"]) < float(pruned["kl"])
    assert float(dense["demo_continuation/acc"]) > 0.5
    assert int(dense["parameters"]) == 134_515_008
    assert pruned["intermediate_size"] == "1017" and float(pruned["ratio_reached"]) == pytest.approx(0.2, abs=1e-4)


def test_every_shape_was_measured_once_by_one_rank(finished):
    dense, control, pruned = results(finished)
    manifests = [json.loads(file.read_text()) for file in finished.glob("store/efficiency/*/manifest.json")]
    assert [it["world_size"] for it in manifests] == [1, 1]
    assert float(dense["decode_speed"]) == float(control["decode_speed"]) == 1.0 and float(pruned["decode_speed"]) > 0
    gone = int(dense["parameters"]) - int(pruned["parameters"])
    assert int(dense["flops_per_token"]) - int(pruned["flops_per_token"]) == 2 * gone, "neurons alone went"
    assert int(dense["generation_memory_bytes"]) > int(pruned["generation_memory_bytes"])
    assert dense["cache_bytes_per_token"] == pruned["cache_bytes_per_token"] == str(30 * 2 * 3 * 64 * 4)


def test_the_kept_neurons_are_those_of_the_highest_scores(finished):
    (importance,) = (finished / "store" / "importance").iterdir()
    (prune,) = (finished / "store" / "prune").iterdir()
    scores = load_file(importance / "importance.safetensors")
    kept = json.loads((prune / "kept.json").read_text())["neurons"]
    for layer in range(30):
        assert kept[layer] == sorted(scores[f"layers.{layer}.entropy"].topk(1017).indices.tolist())


def test_the_pruned_checkpoint_still_speaks(finished):
    checkpoint = finished / results(finished)[2]["checkpoint"]
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.bfloat16
    prompt = tokenizer("In Python, a list is", return_tensors="pt")
    text = tokenizer.decode(model.generate(**prompt, max_new_tokens=12, do_sample=False)[0])
    assert len(text.split()) > 6
