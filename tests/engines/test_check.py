"""Checks: what passes, what is told, and what is no result; the engines here are stand-ins, transformers is real."""

import shutil
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hfprune_launch import check as command
from made_stages import stage_of
from masking import write
from tiny import save_tiny
from worlds import Ranks, run_in_threads

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.engines import check, process
from hfprune_dist.engines.check import NEW_TOKENS, Check
from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.stage import Input
from hfprune_dist.structures.kept import Kept

MODEL = "KeyError: 'model'"  # of an empty request
ANY_SHAPE = Kept.of_all_layers({"neurons": [torch.arange(32), torch.arange(3, 41)]})


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A tiny checkpoint, and the runs of an engine that computes what transformers does."""
    folder = save_tiny(tmp_path_factory.mktemp("model"), num_hidden_layers=1, max_position_embeddings=512)
    runs = []
    for ids, log_probs_TV in check._reference(folder):
        prompt = range(1, len(ids) - NEW_TOKENS)
        runs.append(
            {"log_probs": [log_probs_TV[at - 1, ids[at]].item() for at in prompt], "new": ids[-NEW_TOKENS:].copy()}
        )
    return folder, runs


@pytest.fixture
def answers(monkeypatch):
    """What engines answer, and what they were asked."""
    found, asked = {}, {}
    monkeypatch.setattr(check, "require_engine", lambda *_: None)
    monkeypatch.setattr(
        check, "ask", lambda engine, python, folder, request: asked.update({engine: request}) or found[engine]
    )
    found["asked"] = asked
    return found


def changed(runs, log_prob=0.0, new=None):
    """Runs with another log-probability, or another token at a place of the second prompt."""
    first, second, third = runs
    told = [*second["log_probs"][:-1], second["log_probs"][-1] + log_prob]
    tokens = second["new"] if new is None else [*second["new"][: new[0]], new[1], *second["new"][new[0] + 1 :]]
    return [first, {"log_probs": told, "new": tokens}, third]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({}, "vllm 1.2: log-probabilities within 0 of transformers'; 60 of 60 tokens equal"),
        ({"log_prob": 0.001}, "within 0.001 of"),
        ({"log_prob": -0.1}, "fails: log-probabilities differ by more than 0.01; log-probabilities within 0.1 of"),
        ({"log_prob": float("nan")}, "fails: log-probabilities differ by more than 0.01\n"),
        ({"new": (5, 0)}, "nats behind another; log-probabilities within 0 of transformers'; 45 of 60 tokens equal"),
    ],
)
def test_what_passes_and_what_does_not(answers, checkpoint, change, told, capsys):
    folder, runs = checkpoint
    answers["vllm"] = {"version": "vllm 1.2", "runs": changed(runs, **change)}
    code = command.main([str(folder), "--engine", "vllm"])
    printed = capsys.readouterr().out
    assert told in printed and code == int("fails" in printed)


def test_a_card_has_what_was_found(answers, checkpoint, tmp_path, capsys):
    card = Path(shutil.copytree(checkpoint[0], tmp_path / "checkpoints/pruned")) / "README.md"
    card.write_text("# Mine\n\n- mlx: yes\n- vllm: yes; not tried\n")
    answers["vllm"] = {"version": "vllm 1.2", "runs": checkpoint[1]}
    assert command.main([str(card.parent), "--engine", "vllm"]) == 0
    told = capsys.readouterr().out.splitlines()[0]
    assert "vllm 1.2" in told and card.read_text() == f"# Mine\n\n- mlx: yes\n- {told}\n"
    answers["vllm"] = {"version": "vllm 1.2", "error": "no <lambda>"}
    assert command.main([str(card.parent), "--engine", "vllm"]) == 1
    assert card.read_text().endswith("- vllm: vllm 1.2: fails: no \\<lambda>\n")
    (tmp_path / "sweep.json").touch()  # whose cards have what its own checks find
    answers["vllm"]["error"] = "another"
    assert command.main([str(card.parent), "--engine", "vllm"]) == 1 and "another" not in card.read_text()


def test_a_token_that_is_as_likely_passes():
    """It is held against the one that transformers chose, whatever a third one gets."""
    new, log_probs_TV = list(range(1, NEW_TOKENS + 1)), torch.full((NEW_TOKENS + 2, 30), -9.0)
    log_probs_TV[range(1, NEW_TOKENS + 1), new] = -1.0
    log_probs_TV[8, 28], log_probs_TV[8, 29] = -1.001, -1.5
    for chosen, failure in ((28, ""), (29, "it chooses a token that transformers has 0.5 nats behind another")):
        run = {"log_probs": [-9.0], "new": [*new[:7], chosen, *new[8:]]}
        found = check.compared("1", [([0, 0, *new], log_probs_TV)], [run])
        assert (found.equal, found.failure) == (7, failure)


def test_what_an_engine_says_of_a_checkpoint_is_a_result(answers, checkpoint, capsys):
    answers["mlx"] = {
        "version": "mlx-lm 1",
        "error": "ValueError: '/tmp/a/b.bin' or c/d (https://e/f), [1]/[2]/x, </s>/x",
    }
    assert command.main([str(checkpoint[0]), "--engine", "mlx"]) == 1
    assert (
        capsys.readouterr().out == "mlx: mlx-lm 1: fails: ValueError: 'b.bin' or c/d (https://e/f), [1]/[2]/x, </s>/x\n"
    )


def test_a_vocabulary_that_lacks_tokens_of_the_prompts_is_refused(answers, tmp_path):
    with pytest.raises(UserError, match="its embedding has 200 rows"):
        check.check(save_tiny(tmp_path / "model", vocab_size=200), {"mlx": "python"})


def test_code_runs_only_if_it_is_ours(answers, checkpoint, tmp_path):
    write(open_checkpoint(save_tiny(tmp_path / "dense", max_position_embeddings=512)), ANY_SHAPE, tmp_path / "pruned")
    answers["vllm"] = {"version": "vllm 1", "error": "told"}

    def trusted():
        check.check(tmp_path / "pruned", {"vllm": "python"})
        return answers["asked"]["vllm"]["options"]["trust_remote_code"]

    assert trusted()
    with (tmp_path / "pruned" / "modeling_pruned.py").open("a") as stream:
        stream.write("# more\n")
    assert not trusted()
    (tmp_path / "pruned" / "modeling_pruned.py").unlink()
    assert trusted()  # there is none


def test_bad_input(checkpoint, tmp_path, capsys):
    folder, mlx = str(checkpoint[0]), ["--engine", "mlx"]
    for arguments, told in (
        ([folder, *mlx], f"{sys.executable}: it lacks mlx; name the Python of an environment"),
        ([folder, *mlx, "--python", "./python"], "./python: No such file or directory; name the Python"),
        ([str(tmp_path / "nowhere"), *mlx], "no such folder"),
        ([folder, *mlx, "--exported", str(tmp_path / "nothing.gguf")], "nothing.gguf: no such file or folder"),
        ([folder, "--engine", "tgi"], "invalid choice"),
    ):
        with pytest.raises(SystemExit) as ended:
            command.main(arguments)
        assert ended.value.code == 2 and told in capsys.readouterr().err


def test_gguf_is_needed_for_llama_cpp_alone(answers, checkpoint, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gguf", None)
    monkeypatch.delitem(sys.modules, "hfprune_dist.export.gguf_file", raising=False)
    answers["mlx"] = {"version": "mlx-lm 1", "runs": checkpoint[1]}
    assert command.main([str(checkpoint[0]), "--engine", "mlx"]) == 0
    monkeypatch.setattr(check, "require_engine", process.require_engine)
    with pytest.raises(SystemExit) as ended:
        command.main([str(checkpoint[0]), "--engine", "llama.cpp"])
    assert ended.value.code == 2 and "run: pip install 'gguf>=0.19'" in capsys.readouterr().err


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """A function: have the engine openvino do something when it is imported."""
    for name in ("openvino", "optimum/intel", "torch"):
        (tmp_path / "site" / name).mkdir(parents=True)
        (tmp_path / "site" / name / "__init__.py").write_text("")
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH={tmp_path / "site"} exec {sys.executable} "$@"\n')
    python.chmod(0o755)

    def does(code):
        (tmp_path / "site" / "openvino" / "__init__.py").write_text(f"import os\n__version__ = '1-x'\n{code}\n")
        return str(python)

    return does


@pytest.mark.parametrize(
    ("code", "told"),
    [
        ("raise ValueError('no  such shape')", {"version": "openvino", "error": "ValueError: no such shape"}),
        ("raise ImportError('libcuda')", "openvino could not run: ImportError: libcuda"),
        ("raise RuntimeError('CUDA out of memory')", "could not run: RuntimeError: CUDA out of memory"),
        ("raise KeyboardInterrupt", "could not run: KeyboardInterrupt"),
        ("os.write(2, b'killed\\n\\n'); os._exit(3)", "could not run: its process ended with 3; killed$"),
        (
            "assert 'RANK' not in os.environ and 'TMPDIR' in os.environ",
            {"version": "openvino 1", "error": "KeyError: 'model'"},
        ),
    ],
)
def test_what_is_learned_of_an_engine(engine, code, told, tmp_path, monkeypatch):
    """The real script, in a process of its own."""
    monkeypatch.setenv("RANK", "7")
    python = engine(code)
    process.require_engine("openvino", python)
    if isinstance(told, dict):
        assert process.ask("openvino", python, tmp_path, {}) == told
    else:
        with pytest.raises(UserError, match=told):
            process.ask("openvino", python, tmp_path, {})


def test_a_stage_records_what_was_found(answers, checkpoint, tmp_path):
    folder, runs = checkpoint
    store = Store(tmp_path)
    inputs = {"model": Input("model", str(folder))}
    stage = stage_of("check", "m", {"engines": ["openvino", "mlx"]}, inputs)
    answers |= {"openvino": {"version": "1", "runs": runs}, "mlx": {"version": "2", "error": "no"}}
    run_in_threads(store, stage, Ranks(1))
    found = store.handle(stage.id).manifest()["metrics"]["engines"]
    assert found == {"openvino": asdict(Check("1", pytest.approx(0), 60)), "mlx": asdict(Check("2", failure="no"))}


def test_an_engine_sees_the_gpu_of_the_rank_that_runs_it_alone(tmp_path, monkeypatch):
    """By the number that it has among those that this rank sees; a machine without GPUs has no number."""
    show = (
        "import os, pathlib, sys; pathlib.Path(sys.argv[1]).write_text(os.environ.get('CUDA_VISIBLE_DEVICES', 'all'))"
    )
    monkeypatch.setenv("LOCAL_RANK", "1")
    for seen, count, expected in (("4,GPU-5", 2, "GPU-5"), (None, 2, "1"), (None, 0, "all"), ("", 0, "")):
        if seen is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", seen)
        monkeypatch.setattr(process, "count_gpus", lambda count=count: count)
        assert process._run([sys.executable, "-c", show, str(tmp_path / "seen")]) == 0
        assert (tmp_path / "seen").read_text() == expected
