import json
import subprocess
import sys

import pytest
from damage import nothing_reaches_the_disk
from fork_server import forked
from hfprune_launch import bench
from hfprune_launch.benchmark import isolated, launcher
from hfprune_launch.benchmark.results import Findings
from hfprune_launch.benchmark.settings import Settings
from ranks import ROOT
from tiny import save_tiny

from hfprune_dist.errors import UserError

BENCH = [sys.executable, str(ROOT / "launch" / "bench.py")]


@pytest.mark.slow
def test_a_section_of_a_model_of_ones_own(tmp_path):
    model = save_tiny(tmp_path / "model")
    arguments = ["--model", str(model), "--only", "prune", "--quick", "--out", str(tmp_path / "out")]
    result = subprocess.run(forked([*BENCH, *arguments]), capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    told = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [line["section"] for line in told["lines"]] == ["prune", "prune"]
    assert "| prune | writing the pruned weights, time |" in result.stdout
    assert not [folder for folder in (tmp_path / "out").iterdir() if folder.is_dir()], "nothing is left behind"


@pytest.mark.slow
def test_pruning_takes_the_memory_of_two_tensors(tmp_path):
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 2, "vocab_size": 512}
    model = save_tiny(tmp_path / "model", **sizes)  # six tensors of 32 MiB
    taken = isolated.call(
        "hfprune_launch.benchmark.pruning:take_memory", {"model": str(model), "scratch": str(tmp_path)}, isolated.TIDY
    )
    assert taken <= 2.0


def test_all_sections_are_measured_even_if_nobody_reads_on(tmp_path, monkeypatch, unread):
    measured = []
    monkeypatch.setattr(bench, "_measure", lambda section, _: measured.append(section) or Findings())
    monkeypatch.setattr(bench, "_settings", lambda *_: Settings("model", "text", 512, 1, True, tmp_path))
    with unread:
        assert bench.main(["--out", str(tmp_path / "out")]) == 0
    assert measured == list(bench.SECTIONS) and (tmp_path / "out" / "bench.md").exists()


@pytest.mark.parametrize("cells", [launcher.FEW_CELLS, launcher.QUICK_CELLS])
def test_a_finished_sweep_is_found_finished(tmp_path, cells):
    with nothing_reaches_the_disk():
        command = launcher._finished_sweep(tmp_path / "sweep", cells)
    result = subprocess.run(forked(command), capture_output=True, text=True, timeout=600, check=False)
    assert result.returncode == 0, result.stderr
    assert "to run" not in result.stdout and "missing" not in result.stdout
    assert result.stdout.count(" hfprune ") == cells


def test_a_process_that_fails_says_why():
    with pytest.raises(UserError, match=r"(?s)no_package:anything failed:.*No module named 'no_package'$"):
        isolated.call("no_package:anything", {}, {})


@pytest.mark.slow
def test_memory_of_both_formulations_is_compared_in_processes_of_their_own(tmp_path):
    model = save_tiny(tmp_path / "model", vocab_size=4096)
    text = tmp_path / "text.txt"
    text.write_text("words " * 500)
    where = {"model": str(model), "text": str(text), "dtype": "float32", "tokens": 512}
    taken = {
        method: isolated.call(
            "hfprune_launch.benchmark.scoring:take_memory", {**where, "method": method}, isolated.TIDY
        )
        for method in ("published", "ours")
    }
    assert 0 < taken["ours"] < taken["published"]
