"""A sweep that prunes in two steps, from its plan to its table, on one rank and on two."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file
from sweeps import artifacts, begin_with, finish, make_inputs, results, sweep
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

TWO_STEPS = ["--models", "alpha", "--ratios", "0.2", "--set", "prune.steps=2", "--set", "recovery.method=none"]


def test_two_steps_from_the_plan_to_the_table(tmp_path):
    config, out = make_inputs(tmp_path), tmp_path / "out"
    plan = sweep(config, out, *TWO_STEPS, "--dry-run")
    assert plan.returncode == 0 and "alpha 0.2 step 1/2" in plan.stdout and "alpha 0.2 step 2/2" in plan.stdout
    finish(config, out, *TWO_STEPS, "--ranks", "1")
    _, pruned = results(out)
    assert (pruned["ratio"], pruned["intermediate_size"]) == ("0.2", "14")
    assert float(pruned["ratio_reached"]) == pytest.approx(0.2, abs=0.01)

    windows = [load_file(file)["input_ids"] for file in (out / "store").glob("importance/*/windows.safetensors")]
    assert len(windows) == 2 and windows[0].equal(windows[1])
    kept = json.loads((Path(pruned["checkpoint"]) / "kept.json").read_text())["neurons"]
    assert [len(row) for row in kept] == [14, 14] and max(map(max, kept)) > 30, "numbers of the dense model's neurons"

    begin_with(tmp_path / "two", out, "reference", "evaluate")
    finish(config, tmp_path / "two", *TWO_STEPS)
    for kind in ("importance", "prune"):
        assert artifacts(tmp_path / "two", kind) == artifacts(out, kind)
    again = finish(config, out, *TWO_STEPS)
    assert "stages to run" not in again.stdout


def test_two_steps_of_a_plain_shape(tmp_path):
    """Plain transformers loads the result, which has the same bits on two ranks."""
    asked = [*TWO_STEPS, "--methods", "surgeon-plain", "--ratios", "0.25"]
    config, out = make_inputs(tmp_path), tmp_path / "out"
    finish(config, out, *asked, "--ranks", "1")
    _, pruned = results(out)
    model = AutoModelForCausalLM.from_pretrained(pruned["checkpoint"])
    assert sum(it.numel() for it in model.parameters()) == int(pruned["parameters"])
    assert float(pruned["ratio_reached"]) == pytest.approx(0.25, abs=0.02)
    begin_with(tmp_path / "two", out, "reference", "evaluate")
    finish(config, tmp_path / "two", *asked)
    assert artifacts(tmp_path / "two", "prune") == artifacts(out, "prune")
