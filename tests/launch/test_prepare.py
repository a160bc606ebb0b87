"""Bad texts, models, tasks and pairs: one clear message and exit code 2 before the first stage, also in a dry run."""

import json
import os
import shutil

import pytest
import torch
from hfprune_launch import run as sweep_run
from hfprune_launch import sweep
from made_stages import FakeBackend
from safetensors.torch import load_file, save_file
from sweeps import in_process
from tiny import edit_json

CALIBRATION, HELD_OUT, PAIRS = "calibration.path", "evaluation.fidelity.path", "recovery.path"


@pytest.fixture
def inputs(config, tmp_path):
    """A copy of good inputs, to be damaged."""
    return shutil.copytree(config.parent, tmp_path / "inputs")


@pytest.fixture
def refusal(inputs, tmp_path, monkeypatch):
    """Return the message with which a sweep and its dry run refuse the inputs."""

    def message(*arguments):
        files = ["--config", inputs / "tiny.yaml", "--out", tmp_path / "out"]
        for way in (["--dry-run"], []):
            code, _, said = in_process(sweep.main, *files, *arguments, *way)
            assert code == 2 and said.startswith("error: ")
            assert not (tmp_path / "out").exists(), "nothing is written"
        return said

    monkeypatch.setattr(sweep_run, "LocalBackend", FakeBackend)
    return message


def assert_parts(message, *parts):
    for part in parts:
        assert part in message, message


def test_good_inputs_reach_the_first_stage(inputs, tmp_path, refusal):
    arguments = ["--config", str(inputs / "tiny.yaml"), "--out", str(tmp_path / "out")]
    assert sweep.main([*arguments, "--dry-run"]) == 0
    with pytest.raises(AssertionError, match=r"importance alpha began"):
        sweep.main(arguments)


# Texts.


@pytest.mark.parametrize("key", [CALIBRATION, HELD_OUT])
def test_too_few_documents_are_long_enough(inputs, refusal, key):
    (inputs / "short.jsonl").write_text("\n".join([json.dumps({"text": ""}), json.dumps({"text": "short"})]))
    message = refusal("--set", f"{key}={inputs / 'short.jsonl'}")
    assert_parts(message, "short.jsonl", "documents of at least 31 tokens", "it has 0", "sequence_length")


@pytest.mark.parametrize(
    ("key", "make", "expected"),
    [(CALIBRATION, os.mkfifo, "neither a file nor a folder"), (PAIRS, lambda file: None, "given: No such file")],
    ids=["pipe", "missing"],
)
def test_paths_without_text(inputs, refusal, key, make, expected):
    make(inputs / "given")
    assert_parts(refusal("--set", f"{key}={inputs / 'given'}"), expected)


# Instruction pairs.


def test_pairs_without_anything_to_train_on(inputs, refusal):
    (inputs / "pairs.jsonl").write_text(f"{json.dumps({'instruction': 'x' * 400, 'response': 'tell'})}\n" * 3)
    assert_parts(refusal(), "none of 3 records", "recovery.sequence_length 320")


def test_instructions_that_leave_the_dense_model_no_room(refusal):
    assert_parts(refusal("--set=recovery.answers=dense"), "none of 40 records", "in its second half")


# Models.


def in_float8(model):
    weights = load_file(model / "model.safetensors")
    save_file(weights | {Q: weights[Q].to(torch.float8_e4m3fn)}, model / "model.safetensors", {"format": "pt"})


Q = "model.layers.1.self_attn.q_proj.weight"
MLLAMA = {"model_type": "mllama", "vision_config": {}, "text_config": {}}
MODELS = {
    "float8": (in_float8, [Q, "F8_E4M3", "quantized"]),
    "mllama": (lambda model: edit_json(model / "config.json", **MLLAMA), ["mllama", "vision-language", "llama"]),
    "pickle": (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
        ["pytorch_model.bin", "save_pretrained"],
    ),
    "tokenizer cut": (lambda model: (model / "tokenizer.json").write_text('{"version"'), ["tokenizer can't be loaded"]),
    "no eos": (lambda model: edit_json(model / "tokenizer_config.json", "eos_token"), ["no end-of-sequence token"]),
}


@pytest.mark.parametrize(("damage", "expected"), MODELS.values(), ids=MODELS)
def test_models(inputs, refusal, damage, expected):
    damage(inputs / "alpha")
    assert_parts(refusal(), *expected)


@pytest.mark.parametrize("key", ["calibration", "evaluation.fidelity", "recovery"])
def test_windows_longer_than_the_models_positions(refusal, key):
    message = refusal("--set", f"{key}.sequence_length=513")
    assert_parts(message, f"{key}.sequence_length 513", "max_position_embeddings", "512", "alpha")


def test_a_chat_template_is_needed_where_it_is_applied(refusal):
    assert_parts(refusal("--set", "evaluation.apply_chat_template=true"), "alpha", "chat template")


# Tasks.


def test_a_folder_of_tasks_that_is_gone(inputs, refusal):
    shutil.rmtree(inputs / "tasks")
    assert_parts(refusal(), "tasks", "no such folder")
