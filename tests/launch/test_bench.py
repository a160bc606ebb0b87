"""The benchmark compares two formulations of the same scores, and sees the time and memory that they take."""

import json

import pytest
import torch
from core_definition import definition
from families import save_model
from hfprune_launch import bench
from hfprune_launch.benchmark import scoring
from hfprune_launch.benchmark.published import PublishedScores
from hfprune_launch.benchmark.scoring import OURS, Ours
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm


@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "gpt_neox"])
def test_published_and_ours_agree_with_the_definition(tmp_path, model_type):
    """Also with capped logits, and without gates."""
    checkpoint = open_checkpoint(save_model(tmp_path / "model", model_type))
    causal_lm = load_causal_lm(checkpoint.path, torch.float32).eval()
    windows = torch.randint(3, 60, (4, 24), generator=torch.Generator().manual_seed(1))
    published = PublishedScores(causal_lm, checkpoint.units.outputs_of(causal_lm))
    scorers = [Ours(causal_lm, checkpoint, checkpointing) for checkpointing in OURS.values()]
    for window in windows:
        published.add(window[None])
    for ours in scorers:
        for window in windows:
            ours.add(window[None])
        assert all(weight.grad is None for weight in causal_lm.parameters())
    expected = torch.stack(published.scores).double()
    if model_type == "qwen2":
        torch.testing.assert_close(expected, definition(causal_lm, windows), rtol=1e-4, atol=1e-8)
    for ours in scorers:
        assert (ours.scores_LD - expected).norm() / expected.norm() < 1e-5


def test_memory_that_is_gone_at_the_end_is_seen():
    assert 2**25 < scoring.peak_bytes(lambda: torch.ones(2**24).sum()) < 2**27


def test_both_formulations_are_measured_and_written(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "TOKENS", 64)
    monkeypatch.setattr(scoring, "DTYPES", ["float32"])
    model = save_tiny(tmp_path / "model")
    assert bench.main(["--model", str(model), "--out", str(tmp_path / "bench"), "--rounds", "1"]) == 0
    lines = {what: value for what, value, _ in json.loads((tmp_path / "bench" / "bench.json").read_text())["pass"]}
    assert lines["float32: kept by published and by ours"] > 0.9 and lines["float32: ours, time"] > 0
    assert "| float32: ours, memory |" in (tmp_path / "bench" / "bench.md").read_text()
