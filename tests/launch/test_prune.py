"""One model in, one model out: whole and at home anywhere, made once, and never over anything else."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from fork_server import forked
from hfprune_launch import api, prune
from ranks import ROOT, surroundings
from sweeps import in_process, loaded_by_its_card
from tiny import save_tiny, tiny_text, write_documents, write_pairs
from transformers import AutoModelForCausalLM

SMALL = {
    "calibration": {"samples": 8, "sequence_length": 32, "shard_size": 1, "mixture": [{"path": "a"}, {"path": "b"}]},
    "importance": {"dtype": "float32"},
    "evaluation": {"dtype": "float32", "fidelity": {"windows": 4, "sequence_length": 32}},
    "runtime": {"ranks": 1},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A model, a text, settings for both, and the cache."""
    folder = tmp_path_factory.mktemp("prune")
    save_tiny(folder / "alpha")
    (folder / "notes.txt").write_text(tiny_text(2400, seed=0))
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    return folder


@pytest.fixture(autouse=True)
def cache(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    return place / "cache" / "hfprune"


def arguments(place, out, ratio=0.2, *others):
    given = ["--ratio", ratio, "--text", place / "notes.txt", "--method", "hfprune", "--config", place / "small.yaml"]
    return [place / "alpha", out, *map(str, given), *others]


def pruned(place, out, ratio):
    command = [sys.executable, ROOT / "launch" / "prune.py", *arguments(place, out, ratio)]
    environment = surroundings() | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(forked(command), env=environment, capture_output=True, text=True, timeout=600, check=False)


def read_text(file):
    return "".join(json.loads(line)["text"] for line in file.read_text().splitlines())


@pytest.mark.slow
def test_a_checkpoint_is_whole_and_made_once(place, cache, tmp_path):
    out = place / "made" / "smaller"
    first = pruned(place, out, 0.2)
    assert first.returncode == 0, first.stdout + first.stderr
    *_, told, loads, recipe = first.stdout.splitlines()
    assert told.startswith(f"{out}: ") and " % of the dense model's; KL " in told and " on 4 held-out" in told
    assert f'from_pretrained("{out}")' in loads and "[4/4] done evaluate alpha 0.2 hfprune" in first.stdout
    parts = {file.name: read_text(file) for file in Path(recipe.split(" beside ")[0].split()[-1]).iterdir()}
    notes, end = (place / "notes.txt").read_text(), parts["notes-end.jsonl"]
    assert len(parts) == 2 and parts["notes.jsonl"] + end == notes and len(end) == pytest.approx(len(notes) / 10, abs=1)
    other = pruned(place, place / "half", 0.25)
    assert other.returncode == 0 and "[2/2] done evaluate alpha 0.25 hfprune" in other.stdout, (
        "scores are there already"
    )

    again = in_process(prune.main, *arguments(place, out))
    assert again[0] == 0 and "is there already, made with these settings" in again[1]
    code, _, said = in_process(prune.main, *arguments(place, out, 0.25))
    assert code == 2 and f"{out}: holds a checkpoint of other settings" in said
    given = {"text": place / "notes.txt", "method": "hfprune", "config": [place / "small.yaml"]}
    assert api.prune(place / "alpha", tmp_path / "python", 0.2, **given) == tmp_path / "python"

    moved = shutil.copytree(out, tmp_path / "elsewhere" / "smaller")
    files = {str(file.relative_to(out)): file for file in out.rglob("*")}
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "recipe.yaml"} <= files.keys()
    assert not any(file.is_symlink() for file in files.values())
    assert files["model.safetensors"].stat().st_nlink == 1, "not the store's own file"
    for folder in (cache, out, place / "half"):
        shutil.rmtree(folder)
    model, tokenizer = map(loaded_by_its_card(moved).get, ("model", "tokenizer"))
    dense = AutoModelForCausalLM.from_pretrained(place / "alpha")
    assert model.num_parameters() == pytest.approx(0.8 * dense.num_parameters(), rel=0.01)
    assert model.generate(**tokenizer("ban der", return_tensors="pt"), max_new_tokens=2).shape[0] == 1


@pytest.mark.parametrize(
    ("others", "expected"),
    [
        (["--ratio=0.9"], "ratio 0.9 can't be reached by pruning neurons; the nearest possible is"),
        (["--text=nowhere.txt"], "nowhere.txt: No such file"),
        (["--recover=nowhere.jsonl"], "nowhere.jsonl: No such file"),
        (["--for=vllm,nothing"], "prune.for_engines.1: must be"),
    ],
)
def test_bad_input_is_one_message_and_writes_no_checkpoint(place, cache, tmp_path, others, expected):
    code, _, said = in_process(prune.main, *arguments(place, tmp_path / "out", 0.2, *others))
    assert code == 2 and expected in said and "Traceback" not in said
    assert not list(tmp_path.iterdir()) and not list(cache.glob("alpha-*"))


def test_what_is_in_the_way_stays(place, tmp_path):
    write_documents(tmp_path / "mine.jsonl")
    refused = {tmp_path: "not empty, and not written", tmp_path / "mine.jsonl": "is not a folder"}
    for out, expected in {**refused, "/proc": "is mounted there", place / "alpha" / "x": "stages read what is"}.items():
        code, _, said = in_process(prune.main, *arguments(place, out))
        assert code == 2 and expected in said
    assert [file.name for file in tmp_path.iterdir()] == ["mine.jsonl"] and not (place / "alpha" / "x").exists()


def test_a_dry_run_shows_the_plan_and_runs_nothing(place, cache, tmp_path):
    trained = ["--recover", write_pairs(tmp_path / "pairs.jsonl"), "--set", "recovery.sequence_length=320"]
    code, shown, _ = in_process(prune.main, *arguments(place, tmp_path / "out", 0.15, "--dry-run", *trained))
    assert code == 0 and "alpha 0.15 hfprune + lora" in shown and not (tmp_path / "out").exists()
