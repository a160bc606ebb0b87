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
from sweeps import in_process
from test_imports import COMMANDS
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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--ratios", "20"], ["ratios.0", "less than 1", "did you mean 0.2?"]),
        (["--ratios", "0.1,35.5"], ["ratios.1", "did you mean 0.355?"]),
        (["--ratios", "20%"], ["--ratios '20%'", "20% is 0.2"]),
        (["--ratios", "nan"], ["ratios.0"]),
        (["--set", "ratios=[20]"], ["did you mean 0.2?"]),
        (["--set", "ratios=[twenty]"], ["ratios.0"]),
        (["calibration.samples=3"], ["calibration.samples=3", "write --set calibration.samples=3"]),
        (["--set", "seed=1", "calibration.samples=3"], ["write --set calibration.samples=3"]),
        (["extra"], ["unrecognized arguments: extra"]),
        (["--models", "some/where/else"], ["no such folder"]),
        (["--models", "alpha,{inputs}/alpha"], ["are the same checkpoint", "name it once"]),
        (["--models", "{inputs}/alpha,{inputs}/beta/../alpha/"], ["listed twice"]),
        (["--models", "alpha,alpha"], ["listed twice"]),
        (["--methods", "hfprune,{root}/configs/methods/hfprune.yaml"], ["are the same method", "name it once"]),
        (["--methods", "hfprune,hfprune"], ["listed twice"]),
        (["--methods", "hfprune-experts"], ["'hfprune-experts'", "structures: [experts]", "has no experts"]),
        (["--ratios", "0.1,0.11", "--set", "prune.multiple_of=8"], ["ratios 0.1 and 0.11", "multiples of 8"]),
        (["--ratios", "0.1,0.1001"], ["ratios 0.1 and 0.1001", "once widths are rounded; leave one of them out\n"]),
        (
            ["--ratios", "0.1,0.101", "--methods", "flap", "--set", "prune.multiple_of=8"],
            ["method 'flap'", "ratios 0.1 and 0.101"],
        ),
        (["--set", "runtime.report_to=[tensorbord]"], ["runtime.report_to.0", "'tensorboard', 'trackio' or 'wandb'"]),
        (["--set", "runtime.report_to=[wandb, wandb]"], ["runtime.report_to", "wandb is listed twice"]),
        (["--max-running", "3"], ["--max-running 3", "--profile"]),
        (["--no-follow"], ["--no-follow", "--profile"]),
        (["--out", ""], ["folder is empty"]),
        (["--out", "x" * 300], ["shorter path"]),
        (["--out", "{inputs}/alpha"], ["--out", "the sweep reads what is in", "alpha"]),
        (["--out", "{inputs}/tasks/out"], ["--out", "the sweep reads what is in", "tasks"]),
        (["--set", "evaluation.include_path={inputs}/tasks/choice.yaml"], ["choice.yaml: a file, not a folder"]),
        (["--out", "{inputs}/tiny.yaml"], ["--out", "tiny.yaml", "not a folder"]),
        (["--out", "{inputs}/tiny.yaml/deep/er"], ["--out", "tiny.yaml", "not a folder"]),
        (["--profile", ""], ["no profile ''"]),
        (["--config", ""], ["--config"]),
        (["--criteria", ""], ["--criteria"]),
    ],
)
@pytest.mark.parametrize("dry", [["--dry-run"], []])
def test_a_sweep_that_can_not_be_is_refused(config, tmp_path, monkeypatch, arguments, expected, dry):
    monkeypatch.chdir(tmp_path)
    before = files_below(config.parent)
    given = [
        it.format(inputs=config.parent, root=ROOT) if "{inputs}" in it or "{root}" in it else it for it in arguments
    ]
    code, _, said = in_process(sweep.main, "--config", config, "--out", "out", *given, *dry)
    assert code == 2 and "Traceback" not in said, said
    for part in expected:
        assert part in said
    assert files_below(tmp_path) == [] and files_below(config.parent) == before


def test_a_tracker_that_is_not_installed_is_refused_where_something_is_trained(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # how Python marks modules that can't be imported
    reports = ["--config", config, "--out", tmp_path / "out", "--set", "runtime.report_to=[tensorboard, wandb]"]
    for dry in ([], ["--dry-run"]):
        code, _, said = in_process(sweep.main, *reports, *dry)
        assert code == 2 and "runtime.report_to: wandb is not installed; `pip install wandb`" in said, said
        assert not (tmp_path / "out").exists()
    assert in_process(sweep.main, *reports, "--dry-run", "--set", "recovery.method=none")[0] == 0


def test_a_sweep_may_lie_beside_the_text_that_it_reads_but_not_among_it(config, tmp_path):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "calibration.jsonl").write_bytes((config.parent / "calibration.jsonl").read_bytes())
    reading = ("--config", config, "--set", f"calibration.path={texts}", "--dry-run")
    code, _, said = in_process(sweep.main, *reading, "--out", texts)
    assert code == 2 and "the sweep reads what is in" in said
    assert in_process(sweep.main, *reading, "--out", texts / "out")[0] == 0


@pytest.mark.parametrize("looking", [["--status"], ["--cancel"], ["--logs", "a"]])
def test_where_no_sweep_has_been_run_there_is_none_to_look_at(tmp_path, looking):
    code, _, said = in_process(sweep.main, "--out", tmp_path / "nowhere", *looking)
    assert code == 2 and "no sweep has been run there" in said and "hub" not in said


@pytest.mark.parametrize("ratios", ["0.1,0.2", "0.05,0.2,0.1"])
def test_ratios_of_several_widths_are_told_apart(config, tmp_path, ratios):
    for method in ("surgeon-uniform-block", "flap", "surgeon-any-shape"):
        code, _, said = in_process(
            sweep.main, "--config", config, "--out", tmp_path, "--dry-run", "--ratios", ratios, "--methods", method
        )
        assert (code, said) == (0, "")


@pytest.mark.parametrize("method", ["surgeon-plain", "surgeon-any-shape"])
def test_a_dry_run_tells_what_settings_come_to_on_a_model(config, tmp_path, method):
    where = ["--config", config, "--out", tmp_path / "out", "--dry-run", "--methods", method]
    code, shown, said = in_process(sweep.main, *where)
    assert code == 0
    for part in (
        f", method '{method}': multiple_of is 1 at 0.1, 1 at 0.2",
        ": the largest prune.tensor_parallel that works is 2",
    ):
        assert f"note: model 'alpha'{part}" in " ".join((shown + said).split())
    code, _, said = in_process(sweep.main, *where, "--set", "prune.tensor_parallel=3")
    assert code == 2 and "tensor_parallel 3" in said and "the largest that works is 2" in said
    code, _, said = in_process(sweep.main, *where, "--ratios", "0.95")
    assert code == 2 and "neurons, kv_groups and layers" in said and "the largest possible is" in said
    assert not (tmp_path / "out").exists()


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


def test_methods_of_the_same_settings_are_not_two_rows(config, tmp_path):
    copy = tmp_path / "mine.yaml"
    copy.write_text((ROOT / "configs" / "methods" / "hfprune.yaml").read_text())
    where = ["--config", config, "--out", tmp_path / "out", "--dry-run"]
    code, _, said = in_process(sweep.main, *where, "--methods", f"hfprune,{copy}")
    assert code == 2 and "'alpha 0.1 hfprune + lora' and 'alpha 0.1 mine + lora' would be the same" in said


def test_an_empty_name_of_logs_runs_nothing(config, tmp_path):
    code, _, said = in_process(sweep.main, "--config", config, "--out", tmp_path / "out", "--logs", "")
    assert code == 2 and "no row ''" in said and not (tmp_path / "out").exists()


def test_a_folder_comes_before_the_hub(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_tiny(tmp_path / "org" / "name")
    assert load_config([], {"models": ["org/name"]}).models == [str(tmp_path / "org" / "name")]
    assert load_config([], {"models": ["org/other", "./org/other"]}).models == [
        "org/other",
        str(tmp_path / "org/other"),
    ]


def test_a_hub_id_is_a_model_and_keeps_its_name(tmp_path, monkeypatch):
    """It has the same identity as an alias for the same commit."""
    commit = save_tiny(tmp_path / "snapshots" / "0123abcd")
    asked = []

    def snapshot(name, hub_id, revision, download, optional):
        asked.append((hub_id, revision))
        return commit

    monkeypatch.setattr(sources, "_snapshot", snapshot)

    def model(name, **aliases):
        config = SweepConfig(models=[name], aliases=aliases)
        return sources.resolve_models(config, tmp_path / "none", FileHashes(None), download=False)[0]

    plain, pinned = model("org/some-1.5B"), model("org/some-1.5B@refs/pr/1")
    alias = model("mine", mine={"hub_id": "org/some-1.5B"})
    assert asked == [("org/some-1.5B", "main"), ("org/some-1.5B", "refs/pr/1"), ("org/some-1.5B", "main")]
    assert (plain.name, plain.spelling, pinned.name) == ("some-1.5B", "org/some-1.5B", "some-1.5B@refs/pr/1")
    assert plain.identity == alias.identity


def test_ranks_that_a_file_asks_for_are_capped_and_those_of_the_command_line_refused(config, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    where = ["--config", config, "--out", tmp_path / "out", "--dry-run"]
    code, shown, said = in_process(sweep.main, *where)
    assert (code, said) == (0, "")
    assert "runtime.ranks 2 is more than this machine's 1 GPU; stages run with 1 rank" in shown
    for asked in (["--ranks", "2"], ["--set", "runtime.ranks=2"], ["--set", "runtime={ranks: 2}"]):
        code, _, said = in_process(sweep.main, *where, *asked)
        assert code == 2 and "--ranks 2: this machine has 1 GPU, and a rank needs one of its own; ask for 1" in said
    cuts_alone = ["--ranks", "2", "--set", "recovery.method=none", "--set", "evaluation.tasks=[]"]
    for dry in (["--dry-run"], []):  # whatever the stages that are missing
        code, _, said = in_process(sweep.main, *where[:4], *cuts_alone, *dry)
        assert code == 2 and "--ranks 2: this machine has 1 GPU" in said and not (tmp_path / "out").exists()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    runtime = load_config([config], {}).runtime
    assert fitting_runtime(runtime) == (runtime, "")


def test_rows_that_brackets_name_are_shown_as_they_are(config, tmp_path):
    """Where output is marked up, such names would be taken for colours or raise an error."""
    out = tmp_path / "100% [red]ä \\ '\"[bold]"
    code, shown, said = in_process(sweep.main, "--config", config, "--out", out, "--dry-run")
    assert (code, said) == (0, "") and "8 cells" in shown
    out.mkdir()
    (out / "config.yaml").write_text(yaml.safe_dump(load_config([config], {}).model_dump()))
    code, shown, said = in_process(sweep.main, "--out", out, "--status")
    assert (code, said) == (0, "") and f"configuration: {out}" in shown


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        (report, [""], "folder is empty"),
        (report, ["nowhere"], "no sweep.json"),
        (compare, ["nowhere", "--out", ""], "folder is empty"),
        (compare, ["nowhere", "./nowhere", "--out", "x"], "given twice"),
        (compare, ["nowhere", "--out", "x"], "no sweep.json"),
        (bench, ["--only", ""], "--only"),
        (bench, ["--only", "pass,pass"], "named twice"),
        (bench, ["--only", "passs"], "did you mean 'pass'"),
        (bench, ["--out", ""], "folder is empty"),
        (bench, ["--model", "nowhere"], "no such folder"),
        (report, ["~nobody-of-this-name/runs"], "'~nobody-of-this-name/runs': not a valid path"),
    ],
)
def test_other_commands_refuse_too(tmp_path, monkeypatch, command, arguments, expected):
    monkeypatch.chdir(tmp_path)
    code, _, said = in_process(command.main, *arguments)
    assert code == 2 and expected in said and "Traceback" not in said
    assert files_below(tmp_path) == []


def test_a_tilde_is_the_home_folder_however_it_is_given(config, tmp_path, monkeypatch):
    """Shells replace it in ``--out ~/x``, but not in ``--out=~/x``."""
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    monkeypatch.setenv("HOME", str(config.parent))
    code, shown, said = in_process(sweep.main, f"--config=~/{config.name}", "--out=~/out", "--dry-run")
    assert (code, said) == (0, "") and "8 cells" in shown
    (config.parent / "out").mkdir()
    (config.parent / "out" / "config.yaml").write_text(yaml.safe_dump(load_config([config], {}).model_dump()))
    code, shown, said = in_process(sweep.main, "--out=~/out", "--status")
    assert (code, said) == (0, "") and f"configuration: {config.parent / 'out'}" in shown
    assert files_below(tmp_path / "current") == []


@pytest.mark.parametrize(
    ("model_type", "changes", "expected"),
    [
        ("mixtral", {}, "a mixture of experts; give a model with one MLP in each layer"),
        ("llama", {"intermediate_size": 2}, "ratio 0.2 can't be reached by pruning neurons alone"),
    ],
)
def test_a_model_that_is_not_measured_is_refused(tmp_path, model_type, changes, expected):
    model = save_model(tmp_path / "model", model_type, **changes)
    code, _, said = in_process(bench.main, "--model", model, "--out", tmp_path / "out")
    assert code == 2 and f"--model {model}: {expected}" in said and "Traceback" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["sweep.py", "report.py", "compare.py", "bench.py"])
def test_a_deleted_current_folder_is_one_message(tmp_path, command):
    gone = tmp_path / "gone"
    gone.mkdir()
    script = f"cd {gone} && rmdir {gone} && {sys.executable} {ROOT / 'launch' / command} x --out y"
    result = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=False)
    assert result.returncode == 2 and "deleted" in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["someone/nothing", "someone/nothing@v2"])
def test_a_model_that_can_not_be_downloaded_is_refused(config, tmp_path, name):
    code, _, said = in_process(sweep.main, "--config", config, "--out", tmp_path / "out", "--models", name)
    assert code == 2 and f"{name if '@' in name else name + '@main'} is not in the local hub cache" in said
    assert "nor is there a folder" in said


@pytest.mark.parametrize("section", ["calibration", "recovery", "evaluation.fidelity"])
def test_a_data_set_that_can_not_be_read_is_refused_before_the_first_stage(config, tmp_path, section):
    source = ["--set", f"{section}.path=null", "--set", f"{section}.dataset=someone/nothing"]
    given = ["--config", config, "--out", tmp_path / "out", *source]
    code, _, said = in_process(sweep.main, *given)
    assert code == 2 and "data set 'someone/nothing'" in said and "give a local file with path" in said, said
    assert in_process(sweep.main, *given, "--dry-run")[0] == 0, "which needs no network"


@pytest.mark.parametrize("arguments", [[], ["--ratios", "0.3"], ["--dry-run"]])
def test_a_sweep_without_models_shows_examples(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    code, _, said = in_process(sweep.main, *arguments)
    assert code == 2 and "no models are named" in said and said.count("launch/sweep.py --models") == 3
    assert files_below(tmp_path) == []


def test_a_copy_of_the_project_does_not_run_with_the_packages_of_another(config, tmp_path, monkeypatch):
    """As it would in a second clone, with the environment of the first."""
    (tmp_path / "copy" / "launch").mkdir(parents=True)
    (tmp_path / "copy" / "hfprune_dist").mkdir()
    for name in ("sweep.py", "setup.sh"):
        shutil.copy(ROOT / "launch" / name, tmp_path / "copy" / "launch")
    (tmp_path / "link").symlink_to(ROOT)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "command.py").write_text("")
    (tmp_path / "own" / "driver.py").write_text("")
    refused = {
        "../link/launch/sweep.py": False,
        str(ROOT / "launch" / "sweep.py"): False,
        "hfprune sweep": False,
        "-c": False,
        "driver.py": False,
        "../copy/launch/sweep.py": True,
    }
    monkeypatch.chdir(tmp_path / "own")
    for script, expected in refused.items():
        monkeypatch.setattr(sys, "argv", [script])
        code, _, said = in_process(sweep.main, "--config", config, "--dry-run", "--out", "out")
        assert code == (2 if expected else 0), said
        assert (f"has the project's packages from {ROOT}; activate" in said) is expected
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_python_without_the_packages_is_told_what_to_do(tmp_path, name):
    command = [sys.executable, "-S", str(ROOT / "launch" / f"{name}.py"), "x"]
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert "lacks the project's packages" in result.stderr
    assert re.search(r"(run: source \S*/activate|install them: bash \S*launch/quickstart\.sh)$", result.stderr)


@pytest.mark.parametrize(
    "broken", ["raise ImportError('broken')", "import ctypes; ctypes.CDLL('nowhere.so')", "raise AttributeError('no')"]
)
def test_a_broken_package_on_the_path_is_one_message(tmp_path, broken):
    (tmp_path / "rich.py").write_text(broken)
    command = [sys.executable, str(ROOT / "launch" / "report.py"), "x"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    result = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, env=environment)
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert f"{tmp_path}/rich.py can't be imported" in result.stderr and "PYTHONPATH" in result.stderr


@pytest.mark.parametrize("started", ["hfprune sweep", "-c"])
def test_a_command_runs_at_the_root_of_the_file_system(config, tmp_path, monkeypatch, started):
    """As in a container, where that is the current folder."""
    monkeypatch.chdir("/")
    monkeypatch.setattr(sys, "argv", [started])
    code, _, said = in_process(sweep.main, "--config", config, "--dry-run", "--out", tmp_path / "out")
    assert code == 0, said


@pytest.mark.parametrize("command", [sweep, report, compare, bench])
def test_an_interruption_during_imports_is_no_traceback(command, monkeypatch):
    """Each command runs in a separate process, where its first import of a slow package is interrupted."""
    name = command.__name__.rpartition(".")[2]
    needed = {"report": ["x"], "compare": ["x", "--out", "y"], "bench": ["--model", "x"]}.get(name, [])
    script = f"""
import builtins, os, signal, sys
imported = builtins.__import__
def interrupting(name, *rest):
    if name.split(".")[0] in ("rich", "yaml", "pydantic", "numpy"):
        os.kill(os.getpid(), signal.SIGINT)
    return imported(name, *rest)
builtins.__import__ = interrupting
signal.signal(signal.SIGINT, signal.default_int_handler)
from hfprune_launch import {name}
sys.exit({name}.main({needed!r}))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert result.returncode == 130 and "interrupted" in result.stderr and "Traceback" not in result.stderr


def test_a_folder_that_may_not_be_written_to(config, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, _, said = in_process(sweep.main, "--config", config, "--out", tmp_path / "out", "--dry-run")
    assert code == 2 and f"{tmp_path} can't be written to" in said


def test_names_that_are_no_text_are_refused(config, tmp_path, monkeypatch):
    name = os.fsdecode(b"\xff")
    code, _, said = in_process(sweep.main, "--config", config, "--out", tmp_path / name, "--dry-run")
    assert code == 2 and "isn't UTF-8" in said
    monkeypatch.chdir(tmp_path)
    shutil.copytree(config.parent, name)
    copied = Path(name, config.name)
    asked = [(config, "--models", f"{name}/alpha"), (config, "--models", name), (copied, "--models", "alpha")]
    for file, *given in asked:
        code, _, said = in_process(sweep.main, "--config", file, "--out", "out", "--dry-run", *given)
        assert code == 2 and "this path isn't UTF-8; rename the file or folder" in said, said
