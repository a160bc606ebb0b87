"""The benchmark compares two formulations of the same scores, and sees the time and memory that they take."""

import os
import time
from pathlib import Path

import pytest
import torch
from core_definition import definition
from families import save_model
from hfprune_launch import bench
from hfprune_launch.benchmark import measurement, scoring
from hfprune_launch.benchmark.published import PublishedScores
from hfprune_launch.benchmark.scoring import OURS, Ours
from tiny import save_tiny

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.models.loading import load_causal_lm

HERE = Path(__file__).parent


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
        ours.add(list(windows[:, None]))
        assert all(weight.grad is None for weight in causal_lm.parameters())
    expected = torch.stack(published.scores).double()
    if model_type == "qwen2":
        torch.testing.assert_close(expected, definition(causal_lm, windows), rtol=1e-4, atol=1e-8)
    for ours in scorers:
        assert (ours.scores_LD - expected).norm() / expected.norm() < 1e-5


def test_ratios_are_medians_of_pairs():
    """The machine is ten times slower in the second round."""
    assert measurement.median_ratio([2.0, 30.0, 4.0], [1.0, 10.0, 1.0]) == 3.0


def test_memory_that_is_gone_at_the_end_is_seen():
    # In a process of its own: what earlier tests left free in this one's heap would be taken again, and not be seen.
    environment = {**measurement.TIDY, "PYTHONPATH": f"{HERE}{os.pathsep}{HERE.parent}"}
    assert 2**25 < measurement.call(f"{Path(__file__).stem}:peak_of_a_block", {}, environment) < 2**27


def peak_of_a_block() -> int:
    """In a separate process: the peak of 64 MiB that are in use for half a second."""

    def run() -> None:
        block = torch.ones(2**24)
        time.sleep(0.5)  # so that a busy machine, too, gets round to looking
        block.mul_(1.0)

    return measurement.peak_bytes(run)


def test_sections_run_and_are_written(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench, "TOKENS", 64)
    monkeypatch.setattr(scoring, "DTYPES", ["float32"])
    model = save_tiny(tmp_path / "model")
    arguments = ["--model", str(model), "--out", str(tmp_path / "bench"), "--rounds", "1"]
    assert bench.main(arguments) == 0
    table = (tmp_path / "bench" / "bench.md").read_text()
    assert "different sums among all runs | 1 (1: all have the same bits)" in table


def test_an_unknown_section_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--only", "pas"])
    assert stopped.value.code == 2 and "no section 'pas'; did you mean 'pass'?" in capsys.readouterr().err
