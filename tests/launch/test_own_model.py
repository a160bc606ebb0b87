"""configs/sweeps/own-model.yaml, with user files in the places that it names, and no network."""

import json
import re
import shutil

import pytest
import yaml
from ranks import ROOT
from sweeps import finish, results
from tiny import save_tiny, write_documents, write_pairs
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow

EXAMPLE = ROOT / "configs" / "sweeps" / "own-model.yaml"
# Every Python process reads this first: looking for a machine elsewhere fails, and leaves a trace.
NO_NETWORK = """
import os, pathlib, socket

pathlib.Path(os.environ["ASKED"]).with_name("guarded").touch()
HERE = {"127.0.0.1", "::1", "0.0.0.0", "::", "localhost", socket.gethostname(), "", None}
look_up = socket.getaddrinfo

def here_alone(host, *arguments, **options):
    if host not in HERE:
        pathlib.Path(os.environ["ASKED"]).write_text(str(host))
        raise OSError(f"no network: {host}")
    return look_up(host, *arguments, **options)

connect = socket.socket.connect

def connect_here(self, address):
    if isinstance(address, tuple) and address[0] not in HERE:
        pathlib.Path(os.environ["ASKED"]).write_text(str(address))
        raise OSError(f"no network: {address}")
    return connect(self, address)

socket.getaddrinfo, socket.socket.connect = here_alone, connect_here
"""


def own_files(folder):
    save_tiny(folder / "model", num_hidden_layers=4)
    write_documents(folder / "calibration.jsonl", count=20, words=120)
    write_documents(folder / "heldout.jsonl", words=120, seed=7)
    write_pairs(folder / "instructions.jsonl")
    (folder / "tasks").mkdir()
    questions = [{"question": "ban der", "choices": ["kin", "gos t"], "answer": number % 2} for number in range(6)]
    data = folder / "tasks" / "questions.json"
    data.write_text(json.dumps(questions))
    commented = re.search(r"^#   task: .*\n(#   .*\n)+", EXAMPLE.read_text(), re.MULTILINE)[0]  # of a task for lm-eval
    task = yaml.safe_load(re.sub(r"^#   ", "", commented, flags=re.MULTILINE))
    task["dataset_kwargs"]["data_files"] = str(data)
    (folder / "tasks" / "questions.yaml").write_text(yaml.safe_dump(task))


def test_the_example_runs_to_its_table_without_a_network(tmp_path):
    own_files(tmp_path)
    config = shutil.copy(EXAMPLE, tmp_path)
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(NO_NETWORK)
    asked = tmp_path / "asked"
    guarded = {"PYTHONPATH": str(tmp_path / "guard"), "ASKED": str(asked)}
    sections = ("importance", "recovery", "evaluation")
    settings = ["prune.effort=quick", *(f"{section}.dtype=float32" for section in sections)]
    finish(
        config, tmp_path / "out", *(word for setting in settings for word in ("--set", setting)), environment=guarded
    )
    assert asked.with_name("guarded").exists()
    assert not asked.exists(), asked.read_text()
    dense, control, pruned = results(tmp_path / "out")
    assert float(dense["kl"]) == 0 < float(control["kl"]) and float(pruned["kl"]) > 0
    assert 0.15 < float(pruned["ratio_reached"]) < 0.25 and pruned["method"] == "surgeon-plain"
    assert all(0 <= float(row["own_questions/acc"]) <= 1 for row in (dense, control, pruned))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / pruned["checkpoint"])
    assert sum(weight.numel() for weight in model.parameters()) == int(pruned["parameters"])
