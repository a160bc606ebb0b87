"""Dry runs of models of the hub that aren't in its cache: planned with what the hub tells, or as unknown."""

import os
import subprocess
import sys
from pathlib import Path

from hfprune_launch import sweep
from hub import local_hub
from ranks import ROOT
from sweeps import in_process
from tiny import save_tiny

PAPER = ROOT / "configs" / "sweeps" / "paper.yaml"


def dry_run(folder, *arguments, **environment):
    """Run in a process of its own, as the hub's client reads the environment when it is imported."""
    command = [sys.executable, ROOT / "launch" / "sweep.py", "--dry-run", "--out", folder / "out", *arguments]
    own = {"HF_HOME": str(folder / "cache"), "HF_HUB_DISABLE_XET": "1", "TMPDIR": str(folder), "HF_HUB_OFFLINE": "0"}
    usual = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=False, env={**usual, **own, **environment}
    )


def test_what_can_not_be_looked_up_is_planned_without_its_shape(tmp_path):
    shown = dry_run(tmp_path, "--config", PAPER, "--profile", "example-gpu", HF_HUB_OFFLINE="1")
    assert shown.returncode == 0, shown.stderr
    cells, stages, jobs = 24, 68, shown.stdout.count("#SBATCH --job-name")
    assert f"{cells} cells, {stages} stages: 0 reuse, {stages} run" in shown.stdout
    assert f"{stages} stages in {jobs} jobs" in shown.stdout and jobs < stages
    assert shown.stdout.count("unknown until the model is downloaded") == cells
    assert "width" in shown.stdout and "14336" not in shown.stdout
    assert not list(tmp_path.glob("*")), "nothing is left"


def test_what_the_hub_tells_of_a_model_is_planned_with(tmp_path):
    model = tmp_path / "hub" / "org" / "model"
    save_tiny(model, "llama", shard_size="40KB")
    settings = ["--ratios", "0.2", "--set", "evaluation.tasks=[]", "--set", "recovery.method=none"]
    _, local, _ = in_process(sweep.main, "--dry-run", "--out", tmp_path / "out", "--models", model, *settings)
    with local_hub(tmp_path / "hub") as endpoint:
        shown = dry_run(tmp_path, *settings, "--models", "org/model", HF_ENDPOINT=endpoint)
        unknown = dry_run(tmp_path, *settings, "--models", "org/modell", HF_ENDPOINT=endpoint)
    assert shown.returncode == 0, shown.stderr
    assert "it is downloaded when the sweep runs" in shown.stdout

    def shapes(text):
        return text.partition("checkpoint of")[2].partition("\nnote:")[0]

    assert shapes(shown.stdout) == shapes(local) != ""
    cached = {file.name for file in (tmp_path / "cache").rglob("snapshots/*/*")}
    assert cached <= {"config.json", "model.safetensors.index.json"}
    assert unknown.returncode == 2 and "org/modell@main can't be downloaded" in unknown.stderr
    assert Path(tmp_path / "out").exists() is False
