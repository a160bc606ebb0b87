"""A real pretrained model, from its checkpoint to the table."""

import pytest
import torch
from ranks import ROOT
from sweeps import finish, results
from transformers import AutoModelForCausalLM

pytestmark = [pytest.mark.slow, pytest.mark.thorough]  # tiny models go the same way in test_sweep.py

SETTINGS = {
    "models": "[llama]",
    "ratios": "[0.2]",
    "methods": "[hfprune]",
    "calibration.samples": "2",
    "calibration.shard_size": "1",
    "calibration.sequence_length": "32",
    "calibration.mixture": "null",
    "recovery.method": "none",
    "evaluation.tasks": "[demo_continuation]",
    "evaluation.limit": "4",
    "evaluation.fidelity.windows": "2",
    "evaluation.fidelity.sequence_length": "128",
    "evaluation.fidelity.texts": "null",
    "efficiency.enabled": "false",
    "runtime.ranks": "1",
}


@pytest.fixture(scope="module")
def finished(real_assets, tmp_path_factory):
    out = tmp_path_factory.mktemp("real") / "out"
    places = {
        "aliases.llama.path": real_assets / "llama",
        "calibration.path": real_assets / "text" / "calibration.jsonl",
        "evaluation.include_path": real_assets / "tasks",
        "evaluation.fidelity.path": real_assets / "text" / "heldout.jsonl",
    }
    assignments = [f"--set={key}={value}" for key, value in (SETTINGS | places).items()]
    finish(ROOT / "configs" / "demo.yaml", out, *assignments)
    return out


def test_the_table_tells_a_pretrained_model_from_a_pruned_one(finished):
    dense, pruned = results(finished)
    assert 10 < float(dense["perplexity"]) < 30, "English, read by a pretrained model"
    assert float(pruned["perplexity"]) > 1.1 * float(dense["perplexity"])
    assert float(dense["kl"]) == 0 < float(pruned["kl"]) < 4, "most of it is left, although two windows tell little"
    assert float(dense["demo_continuation/acc"]) > 0.5
    assert int(dense["parameters"]) == 134_515_008
    assert pruned["intermediate_size"] == "1016" and float(pruned["ratio_reached"]) == pytest.approx(0.2, abs=5e-4)
    assert AutoModelForCausalLM.from_pretrained(finished / pruned["checkpoint"]).dtype == torch.bfloat16
