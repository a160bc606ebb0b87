"""Input that commands refuse: one message, exit code 2, nothing written, also in dry runs. In-process, for speed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from families import save_model
from hfprune_launch import bench, compare, report, sweep
from hfprune_launch.local.hardware import fitting_runtime
from ranks import ROOT
from sweeps import in_process, make_inputs
from sweeps import sweep as started
from tiny import save_tiny

from hfprune_dist.config.load import load_config
from hfprune_dist.config.schema import SweepConfig
from hfprune_dist.planning import model_sources as sources
from hfprune_dist.store.hashing import FileHashes


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
        ("--ratios=20", "ratios.0: must be less than 1"),
        ("--ratios=a lot", "--ratios 'a lot'"),
        ("--ratios=0.9", "nearest possible is 0.278"),
        ("--models=", "--models"),
        ("--config=nowhere.yaml", "nowhere.yaml: No such file"),
        ("--ranks=0", "runtime.ranks: must be greater"),
        ("--max-running=3", "--profile"),
        ("--cancel --dry-run", "not allowed with"),
        ("--profile=", "no profile ''"),
        ("--profile=local-cluster --ranks=2", "tasks_per_node"),
        ("calibration.samples=3", "write --set calibration.samples=3"),
        ("--logs=", "no row ''"),
        # Settings.
        ("--set=calibration.sample=3", "did you mean 'samples'"),
        ("--set=calibration.samples=[1", "not a YAML value"),
        ("--set=calibration.path=nowhere.jsonl", "nowhere.jsonl: No such file"),
        ("--set=calibration.text_field=txt", "the record has text"),
        ("--set=recovery.batch_size=5", "recovery.batch_size 5"),
        ("--set=runtime.report_to=[tensorbord]", "'tensorboard', 'trackio' or 'wandb'"),
        ("--set=evaluation.include_path={inputs}/tasks/choice.yaml", "choice.yaml: a file, not a folder"),
        ("--set=prune.tensor_parallel=3 --methods=surgeon-plain", "the largest that works is 2"),
        # Names of models and methods.
        ("--models=alhpa", "did you mean 'alpha'?"),
        ("--models=some/where/else", "no such folder"),
        ("--models=alpha,{inputs}/alpha", "are the same checkpoint"),
        ("--models=someone/nothing", "is not in the local hub cache"),
        ("--methods=hfprune,hfprune", "listed twice"),
        ("--methods=hfprune,{root}/configs/methods/hfprune.yaml", "are the same method"),
        ("--methods=hfprune-experts", "has no experts"),
        ("--methods=lorap --set=prune.refit=dense", "low_rank"),
        # Folders.
        ("--out=", "folder is empty"),
        ("--out={inputs}/tiny.yaml/deep/er", "not a folder"),
        ("--out={inputs}/alpha", "the sweep reads what is in"),
        ("--out=\udcff", "isn't UTF-8"),
    ],
)
@pytest.mark.parametrize("dry", [True, False])
def test_a_sweep_that_can_not_be_is_refused(config, tmp_path, monkeypatch, arguments, told, dry):
    monkeypatch.chdir(tmp_path)
    named = arguments.replace("{inputs}", str(config.parent)).replace("{root}", str(ROOT))
    given = [named] if "=a lot" in named else named.split(" ")
    looks = dry and not {"--cancel", "--logs=", "--models=someone/nothing"} & {*given}
    given = ["--config", config, "--out", "out", *given, *(["--dry-run"] if looks else [])]
    assert told in refused(sweep.main, *given, folders=(tmp_path, config.parent))


@pytest.mark.parametrize(
    ("file", "content", "told"),
    [
        ("model.safetensors", None, "model.safetensors"),
        ("model.safetensors", b"\0" * 4, "header is damaged"),
        ("config.json", b"{", "not valid JSON"),
        ("config.json", b'{"model_type": "gpt2"}', "'gpt2'"),
        ("tokenizer.json", None, "tokenizer"),
    ],
)
def test_damaged_checkpoints_are_refused(tmp_path, file, content, told):
    config = make_inputs(tmp_path)
    (tmp_path / "alpha" / file).unlink()
    if content is not None:
        (tmp_path / "alpha" / file).write_bytes(content)
    if file == "tokenizer.json":
        (tmp_path / "alpha" / "tokenizer_config.json").unlink(missing_ok=True)
    assert told in refused(sweep.main, "--config", config, "--out", tmp_path / "out", folders=(tmp_path,))


@pytest.mark.parametrize(
    ("command", "arguments", "told"),
    [
        (report, ["nowhere"], "no sweep.json"),
        (report, ["~nobody-of-this-name/runs"], "'~nobody-of-this-name/runs': not a valid path"),
        (compare, ["nowhere", "./nowhere", "--out", "x"], "given twice"),
        (compare, ["nowhere", "--out", "x"], "no sweep.json"),
        (bench, ["--only", "passs"], "did you mean 'pass'"),
        (bench, ["--model", "nowhere"], "no such folder"),
        (sweep, ["--ratios", "0.3"], "no models are named"),
        (sweep, ["--status", "--out", "nowhere"], "no sweep has been run there"),
    ],
)
def test_other_commands_refuse_too(tmp_path, monkeypatch, command, arguments, told):
    monkeypatch.chdir(tmp_path)
    assert told in refused(command.main, *arguments, folders=(tmp_path,))


def test_a_model_that_is_not_measured_is_refused(tmp_path):
    model = save_model(tmp_path / "model", "mixtral")
    said = refused(bench.main, "--model", model, "--out", tmp_path / "out", folders=(tmp_path,))
    assert f"--model {model}: a mixture of experts" in said


def test_a_tracker_that_is_not_installed_is_refused_where_something_is_trained(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python marks modules that can't be imported
    reports = ["--config", config, "--out", tmp_path / "out", "--set", "runtime.report_to=[tensorboard, wandb]"]
    assert "wandb is not installed; `pip install wandb`" in refused(sweep.main, *reports, folders=(tmp_path,))
    assert in_process(sweep.main, *reports, "--dry-run", "--set", "recovery.method=none")[0] == 0


def test_a_sweep_may_lie_beside_the_text_that_it_reads_but_not_among_it(config, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "calibration.jsonl").write_bytes((config.parent / "calibration.jsonl").read_bytes())
    reading = ("--config", config, "--set", f"calibration.path={texts}", "--dry-run")
    assert "the sweep reads what is in" in refused(sweep.main, *reading, "--out", texts, folders=(tmp_path,))
    assert in_process(sweep.main, *reading, "--out", texts / "out")[0] == 0


@pytest.mark.parametrize("section", ["calibration", "recovery", "evaluation.fidelity"])
def test_a_data_set_that_can_not_be_read_is_refused_before_the_first_stage(config, tmp_path, section):
    source = ["--set", f"{section}.path=null", "--set", f"{section}.dataset=someone/nothing"]
    given = ["--config", config, "--out", tmp_path / "out", *source]
    assert "data set 'someone/nothing'" in refused(sweep.main, *given, folders=(tmp_path,))
    assert in_process(sweep.main, *given, "--dry-run")[0] == 0, "which needs no network"


def test_a_folder_that_may_not_be_written_to(config, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    given = ["--config", config, "--out", tmp_path / "out", "--dry-run"]
    assert f"{tmp_path} can't be written to" in refused(sweep.main, *given, folders=(tmp_path,))


def test_ranks_that_a_file_asks_for_are_capped_and_those_of_the_command_line_refused(config, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    where = ["--config", config, "--out", tmp_path / "out", "--dry-run"]
    code, shown, said = in_process(sweep.main, *where)
    assert (code, said) == (0, "")
    assert "runtime.ranks 2 is more than this machine's 1 GPU; stages run with 1 rank" in shown
    for asked in (["--ranks", "2"], ["--set", "runtime={ranks: 2}"]):
        said = refused(sweep.main, *where, *asked, folders=(tmp_path,))
        assert "--ranks 2: this machine has 1 GPU, and a rank needs one of its own; ask for 1" in said
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    runtime = load_config([config], {}).runtime
    assert fitting_runtime(runtime) == (runtime, "")


# What is not refused.


def test_a_hub_id_is_a_model_and_keeps_its_name(tmp_path, monkeypatch):
    """It has the same identity as an alias for the same commit."""
    commit = save_tiny(tmp_path / "snapshots" / "0123abcd")
    monkeypatch.setattr(sources, "_snapshot", lambda *_, **__: commit)

    def model(name, **aliases):
        config = SweepConfig(models=[name], aliases=aliases)
        return sources.resolve_models(config, tmp_path / "none", FileHashes(None), download=False)[0]

    plain, pinned = model("org/some-1.5B"), model("org/some-1.5B@refs/pr/1")
    assert (plain.name, plain.spelling, pinned.name) == ("some-1.5B", "org/some-1.5B", "some-1.5B@refs/pr/1")
    assert plain.identity == model("mine", mine={"hub_id": "org/some-1.5B"}).identity


def test_a_dry_run_shows_what_checkpoints_will_be(config, tmp_path):
    methods = "hfprune,flap,surgeon-plain"
    where = ["--config", config, "--out", tmp_path / "out", "--dry-run", "--models", "alpha", "--ratios", "0.2"]
    code, shown, said = in_process(sweep.main, *where, "--methods", methods, "--set", "recovery.method=none")
    assert (code, said) == (0, "")
    lines = [" ".join(line.split()) for line in shown.splitlines()]
    place = lines.index("checkpoint of width KV heads layers ratio")
    dense, uniform, by_score, plain = lines[place + 1 : place + 5]
    assert dense == "alpha dense 48 2 2 0.0000"
    assert re.fullmatch(r"alpha 0.2 hfprune \d+ 2 2 0.(19|20)\d\d", uniform)
    assert by_score == "alpha 0.2 flap - - 2 - scores decide, layer by layer"
    measured = "the closest of 2 shapes, by measurement"
    assert re.fullmatch(rf"alpha 0.2 surgeon-plain \d+-\d+ 1-2 2 0.20\d\d {measured}", plain)


def test_a_dry_run_prints_the_plan_and_writes_nothing(config, tmp_path):
    texts = [{"path": str(config.parent / f"{name}.jsonl")} for name in ("calibration", "heldout")]
    mixed = ["--set", "calibration.path=null", "--set", f"calibration.mixture={texts}"]
    code, shown, _ = in_process(sweep.main, "--config", config, "--out", tmp_path / "out", "--dry-run", *mixed)
    assert code == 0 and not (tmp_path / "out").exists()
    assert "8 cells, 22 stages: 0 reuse, 22 run" in shown and shown.count("not made yet") == 22


def test_a_tilde_is_the_home_folder_however_it_is_given(config, tmp_path, monkeypatch):
    """Shells replace it in ``--out ~/x``, but not in ``--out=~/x``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(config.parent))
    (config.parent / "out").mkdir()
    (config.parent / "out" / "config.yaml").write_text(yaml.safe_dump(load_config([config], {}).model_dump()))
    code, shown, said = in_process(sweep.main, "--out=~/out", "--status")
    assert (code, said) == (0, "") and f"configuration: {config.parent / 'out'}" in shown
    assert files_below(tmp_path) == []


def test_help_names_every_flag():
    """It runs in a separate process, whereas everything else here runs in forks."""
    result = started(None, "unused", "--help", real=True)
    shared = ("--models", "--ratios", "--config", "--set", "--out", "--backend", "--ranks", "--criteria", "--dry-run")
    slurm = ("--profile", "--max-running", "--follow", "--status", "--cancel", "--logs")
    assert result.returncode == 0 and all(flag in result.stdout for flag in shared + slurm)


# Surroundings in which commands can't run.


def outcome(*command, **settings):
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False, **settings)


def test_a_deleted_current_folder_is_one_message(tmp_path):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && {sys.executable} {ROOT / 'launch' / 'sweep.py'} --out y"
    result = outcome("bash", "-c", script)
    assert result.returncode == 2 and "deleted" in result.stderr and "Traceback" not in result.stderr


def test_a_copy_of_the_project_does_not_run_with_the_packages_of_another(config, tmp_path, monkeypatch):
    """As it would in a second clone, with the environment of the first."""
    (tmp_path / "copy" / "launch").mkdir(parents=True)
    (tmp_path / "copy" / "hfprune_dist").mkdir()
    for name in ("sweep.py", "setup.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "copy" / "launch")
    (tmp_path / "link").symlink_to(ROOT)
    monkeypatch.chdir(tmp_path)
    for script, code in (("link/launch/sweep.py", 0), ("hfprune sweep", 0), ("copy/launch/sweep.py", 2)):
        monkeypatch.setattr(sys, "argv", [script])
        ended, _, said = in_process(sweep.main, "--config", config, "--dry-run", "--out", "out")
        assert ended == code and (f"has the project's packages from {ROOT}; activate" in said) is (code == 2), said


def test_a_python_without_the_packages_is_told_what_to_do(tmp_path):
    result = outcome(sys.executable, "-S", ROOT / "launch" / "sweep.py", "x", cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "lacks the project's packages" in result.stderr


def test_a_broken_package_on_the_path_is_one_message(tmp_path):
    (tmp_path / "rich.py").write_text("raise AttributeError('no')")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = outcome(sys.executable, ROOT / "launch" / "report.py", "x", cwd=tmp_path, env=environment)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert f"{Path(tmp_path)}/rich.py can't be imported" in result.stderr and "PYTHONPATH" in result.stderr


def test_an_interruption_during_imports_is_no_traceback():
    script = """
import builtins, os, signal, sys
imported = builtins.__import__
def interrupting(name, *rest):
    if name.split(".")[0] in ("rich", "yaml", "pydantic", "numpy"):
        os.kill(os.getpid(), signal.SIGINT)
    return imported(name, *rest)
builtins.__import__ = interrupting
signal.signal(signal.SIGINT, signal.default_int_handler)
from hfprune_launch import sweep
sys.exit(sweep.main([]))
"""
    result = outcome(sys.executable, "-c", script, cwd=ROOT)
    assert result.returncode == 130 and "interrupted" in result.stderr and "Traceback" not in result.stderr
