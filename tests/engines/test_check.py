"""Checks: what passes, what is told, and what becomes of the card; the engines here are stand-ins."""

import sys

import pytest
from hfprune_launch import check as command
from made_stages import stage_of
from tiny import save_tiny
from worlds import Ranks, run_in_threads

from hfprune_dist.engines import check
from hfprune_dist.engines.check import Check, loads_in, with_line
from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input

ONE = {"ids": [1, 2, 3], "log_probs": [-1.0, -2.0], "new": [5, 6], "margins": [0.5, 0.001]}


@pytest.fixture
def run(monkeypatch):
    """What the reference and the engine answer."""
    answers = {"transformers": {"version": "transformers 5", "runs": [ONE]}}
    monkeypatch.setattr(check, "_run", lambda engine, *_: answers[engine])
    return answers


@pytest.fixture
def checkpoint(tmp_path):
    (tmp_path / "config.json").write_text(
        '{"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2, "num_key_value_heads": 2}'
    )
    (tmp_path / "README.md").write_text("# A card\n")
    return tmp_path


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, "the same as transformers 5: log-probabilities within 0, 2 of 2 tokens equal"),
        ({"log_probs": [-1.0, -2.001]}, "within 0.001, "),
        ({"new": [5, 7]}, "1 of 2 tokens equal"),  # a tie, but for rounding
        ({"new": [6, 7]}, "fails: it chooses a token that transformers has 0.5 nats behind another; log-prob"),
        ({"new": [5]}, "1 of 2 tokens equal"),
        ({"log_probs": [-1.0, -2.1]}, "differ by more than 0.01"),
        ({"log_probs": [-1.0, float("nan")]}, "differ by more than 0.01"),
    ],
)
def test_what_passes_and_what_does_not(run, checkpoint, changes, told, capsys):
    run["vllm"] = {"version": "vllm 1.2", "runs": [ONE | changes]}
    code = command.main([str(checkpoint), "--engine", "vllm"])
    printed = capsys.readouterr().out
    assert told in printed and code == int("fails" in printed)
    assert told in (checkpoint / "README.md").read_text()


def test_an_engine_that_fails_is_told_in_the_card(run, checkpoint):
    run["mlx"] = {"version": "mlx-lm 1", "error": "ValueError: no such shape"}
    assert command.main([str(checkpoint), "--engine", "mlx"]) == 1
    (line,) = [line for line in (checkpoint / "README.md").read_text().splitlines() if line.startswith("- mlx")]
    assert line.startswith("- mlx: mlx-lm 1 (20") and line.endswith(") fails: ValueError: no such shape")


def test_bad_input(run, checkpoint, tmp_path, capsys):
    run["vllm"] = {"missing": "vllm"}
    for arguments, told in (
        ([str(checkpoint), "--engine", "vllm"], f"has no vllm: {sys.executable} -m pip install vllm"),
        ([str(tmp_path / "nowhere"), "--engine", "vllm"], "no readable config.json"),
        ([str(checkpoint), "--engine", "tgi"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == 2 and told in capsys.readouterr().err


def test_a_line_replaces_that_of_its_engine():
    config = {"model_type": "llama", "hidden_size": 8, "num_attention_heads": 2}
    card = f"# A model\n\n{loads_in(config)}\n\n## More\n\n- mlx: is not meant\n"
    passed, failed = Check("mlx", "mlx 1", "5", "now", 0.0, 2, 2), Check("mlx", "mlx 1", "5", "now", failure="bad")
    once = with_line(with_line(card, failed), passed)
    assert once.count("- mlx:") == 2 and once.endswith("is not meant\n") and "bad" not in once
    assert f"- mlx: {passed.line()}" in once.splitlines() and "- vllm: yes" in once.splitlines()
    assert with_line("# Theirs", passed).splitlines()[-2:] == ["", f"- mlx: {passed.line()}"]


def test_a_stage_records_what_was_found(run, tmp_path):
    save_tiny(tmp_path / "model")
    run["openvino"] = {"version": "openvino 1", "runs": [ONE]}
    store = Store(tmp_path)
    stage = stage_of("check", "m", {"engine": "openvino"}, {"model": Input("model", str(tmp_path / "model"))})
    run_in_threads(store, stage, Ranks(1))
    found = Check(**store.handle(stage.id).manifest()["metrics"])
    assert (found.engine, found.equal, found.failure) == ("openvino", 2, "")


def test_transformers_answers_and_an_engine_of_another_python_is_missed(tmp_path, monkeypatch):
    """The real script, in processes of their own; ranks' variables don't reach them."""
    monkeypatch.setenv("WORLD_SIZE", "7")
    save_tiny(tmp_path, num_hidden_layers=1)
    answer = check._run("transformers", sys.executable, str(tmp_path), ["ab", "cde"], {})
    assert [len(run["log_probs"]) + 1 for run in answer["runs"]] == [len(run["ids"]) for run in answer["runs"]]
    assert all(len(run["new"]) == len(run["margins"]) == check.NEW_TOKENS for run in answer["runs"])
    assert check._run("mlx", sys.executable, "", [], {}) == {"missing": "mlx_lm"}
    assert "ended with 1" in check._run("transformers", "/bin/false", "", [], {})["error"]
    with pytest.raises(UserError, match="no Python to run mlx"):
        check._run("mlx", str(tmp_path / "python"), "", [], {})
