"""Input that commands refuse: one message, exit code 2, nothing written. In-process, for speed."""

import shutil
import subprocess
import sys

import pytest
from hfprune_launch import compare, report, sweep
from ranks import ROOT
from sweeps import in_process


@pytest.fixture(autouse=True)
def safe(monkeypatch):
    """Block the network, and fail if a stage begins that should have been refused."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("hfprune_launch.local.backend.LocalBackend.run", lambda *_: pytest.fail("a stage has begun"))


def files_below(folder):
    return sorted(folder.rglob("*"))


def refused(main, *arguments, folders=()):
    """Run a command that must refuse its input, write nothing to these folders, and say so once; return its message."""
    before = [files_below(folder) for folder in folders]
    code, _, said = in_process(main, *arguments)
    assert code == 2 and "Traceback" not in said and said.count("error: ") == 1, said
    assert [files_below(folder) for folder in folders] == before
    return said


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        # Flags, alone and together.
        ("--max-running=3", "--profile"),
        ("--profile=local-cluster --ranks=2", "tasks_per_node"),
        ("calibration.samples=3", "unrecognized arguments: calibration.samples=3"),
        # Names of models and methods.
        ("--models=alhpa", "did you mean 'alpha'?"),
        ("--models=alpha,{inputs}/alpha", "two models are called 'alpha'"),
        ("--models=someone/nothing", "can't be downloaded"),
        # Folders.
        ("--out={inputs}/alpha", "stages read what is in"),
        ("--out=other", "other/config.yaml: not a sweep's"),
        ("--out=~nobody-of-this-name/x", "no such user"),
        ("--out=/etc/passwd/x", "/etc/passwd is not a folder"),
        ("--out=a\nb\x1b", "a\\nb\\x1b': its name can't be printed"),
    ],
)
def test_a_sweep_that_can_not_be_is_refused(config, tmp_path, monkeypatch, arguments, told):
    """By whichever part finds it; what dry runs refuse too is in test_prepare.py."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.yaml").write_text("of: another tool")
    given = ["--config", config, "--out", "out", *arguments.replace("{inputs}", str(config.parent)).split(" ")]
    assert told in refused(sweep.main, *given, folders=(tmp_path, config.parent))


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        (report, ["nowhere"], "no sweep.json"),
        (compare, ["nowhere", "./nowhere", "--out", "x"], "given twice"),
        (sweep, ["--ratios", "0.3"], "no models are named"),
        (sweep, ["--status", "--out", "nowhere"], "no sweep.json"),
    ],
)
def test_other_commands_refuse_too(tmp_path, monkeypatch, command, arguments, told):
    monkeypatch.chdir(tmp_path)
    assert told in refused(command.main, *arguments, folders=(tmp_path,))


def test_a_current_folder_that_is_gone_is_told(tmp_path, monkeypatch):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the current folder has been deleted" in refused(report.main, "runs")


def test_a_tracker_that_is_not_installed_is_refused_where_something_is_trained(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python marks modules that can't be imported
    reports = ["--config", config, "--out", tmp_path / "out", "--set", "runtime.report_to=[tensorboard, wandb]"]
    assert "wandb is not installed; `pip install wandb`" in refused(sweep.main, *reports, folders=(tmp_path,))
    assert in_process(sweep.main, *reports, "--dry-run", "--set", "recovery.method=none")[0] == 0


def test_an_engine_that_its_python_lacks_is_refused_where_it_measures_speed_or_answers(config, tmp_path):
    measured = ["--config", config, "--out", tmp_path / "out", "--set", "efficiency.engine=vllm"]
    measured += ["--set", f"runtime.engine_pythons.vllm={sys.executable}"]
    assert in_process(sweep.main, *measured, "--dry-run")[0] == 0, "off unless it is enabled"
    for needed in ("efficiency.enabled=true", "recovery.answers=dense", "engines=[vllm]"):
        told = refused(sweep.main, *measured, "--set", needed, folders=(tmp_path,))
        assert f"{sys.executable}: it lacks vllm; name the Python" in told
    unknown = refused(sweep.main, *measured, "--set", "efficiency.engine=mlx", folders=(tmp_path,))
    assert "efficiency.engine" in unknown and "vllm" in unknown


def test_a_dry_run_runs_nothing_that_a_configuration_names(config, tmp_path):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\ntouch {tmp_path}/ran\n")
    program.chmod(0o755)
    named = ["--set", f"runtime.engine_pythons.vllm={program}", "--set", "engines=[vllm]"]
    assert in_process(sweep.main, "--config", config, "--out", tmp_path / "out", *named, "--dry-run")[0] == 0
    assert not (tmp_path / "ran").exists()


def test_a_sweep_may_lie_beside_the_text_that_it_reads_but_not_among_it(config, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "calibration.jsonl").write_bytes((config.parent / "calibration.jsonl").read_bytes())
    reading = ("--config", config, "--set", f"calibration.path={texts}", "--dry-run")
    assert "stages read what is in" in refused(sweep.main, *reading, "--out", texts, folders=(tmp_path,))
    assert in_process(sweep.main, *reading, "--out", texts / "out")[0] == 0


@pytest.mark.parametrize("section", ["calibration", "recovery", "evaluation.fidelity"])
def test_a_data_set_that_can_not_be_read_is_refused_before_the_first_stage(config, tmp_path, section):
    source = ["--set", f"{section}.path=null", "--set", f"{section}.dataset=someone/nothing"]
    given = ["--config", config, "--out", tmp_path / "out", *source]
    assert "data set 'someone/nothing'" in refused(sweep.main, *given, folders=(tmp_path,))
    assert in_process(sweep.main, *given, "--dry-run")[0] == 0, "which needs no network"


# Surroundings in which commands can't run.


def test_a_python_without_the_packages_or_with_those_of_another_clone_is_told_what_to_do(tmp_path):
    shutil.copytree(ROOT / "launch", tmp_path / "copy" / "launch")
    (tmp_path / "link").symlink_to(ROOT)
    ran = {"link": [sys.executable], "copy": [sys.executable], "none": [sys.executable, "-S"]}
    told = {"link": "", "copy": f"has the packages of {ROOT}; run", "none": "lacks the project's packages"}
    for name, python in ran.items():
        script = (ROOT if name == "none" else tmp_path / name) / "launch" / "schema.py"
        result = subprocess.run([*python, script], capture_output=True, text=True, check=False, cwd=tmp_path)
        assert result.returncode == (2 if told[name] else 0) and told[name] in result.stderr
        assert result.stderr.count("\n") == bool(told[name])
