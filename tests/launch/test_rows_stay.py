"""Rows of a folder stay until they are removed, even if what their results rest on is gone; no stage runs here."""

import csv
import json
import os
import re
import shutil
import threading
from functools import partial

import numpy as np
import pytest
import yaml
from hfprune_launch import compare, report, screen, sweep, sweep_folder
from hfprune_launch.modes import sweep_plan, sweep_run
from hfprune_launch.sweep_folder import read_record
from rows import make_artifact
from safetensors.numpy import save_file
from sweeps import in_process, planned

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.load import load_config
from hfprune_dist.config.yaml_text import to_yaml
from hfprune_dist.store.artifacts import Store
from hfprune_dist.structures.score_names import SCORES


def fill(out, wanted, but=()):
    """Write artifacts for all stages of a plan, as if they had run."""
    store = Store(out / "store")
    for stage in wanted.stages.values():
        if stage.kind in but or store.handle(stage.id).manifest() is not None:
            continue
        make_artifact(store, stage)


def run(*arguments, command=sweep):
    return in_process(command.main, *arguments)


def done(config, out, *arguments, **overrides):
    """Run a sweep whose stages are all done, and return what it prints."""
    fill(out, planned(config, **overrides)[1])
    code, shown, said = run("--config", config, "--out", out, *arguments)
    assert code == 0, said
    return shown


def labels(out):
    with (out / "results.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [row["label"] for row in rows] == [
        row["label"] for row in json.loads((out / "results.json").read_text())["rows"]
    ]
    return [row["label"] for row in rows]


def planned_actions(config, out, *arguments):
    """Map each action that --dry-run names to its kinds of stages."""
    code, shown, said = run("--config", config, "--out", out, "--dry-run", *arguments)
    assert code == 0, said
    actions = {"reuse": set(), "run": set(), "not needed": set()}
    for line in shown.splitlines():
        for action, kinds in actions.items():
            if re.search(rf"\b[0-9a-f]{{20}}  {action}", line):
                kinds.add(line.split()[0])
    return actions


@pytest.mark.parametrize("gone", [["reference"], ["importance", "reference", "prune"]])
def test_what_results_stand_on_is_not_made_again(config, tmp_path, gone):
    out = tmp_path / "out"
    done(config, out)
    before = (out / "results.md").read_text().count("0.5000")
    for kind in gone:
        shutil.rmtree(out / "store" / kind)
    actions = planned_actions(config, out)
    assert actions["run"] == set() and actions["not needed"] == set(gone)
    code, shown, _ = run("--config", config, "--out", out)
    assert code == 0 and "stages to run" not in shown
    assert (out / "results.md").read_text().count("0.5000") == before
    _, status, _ = run("--config", config, "--out", out, "--status")
    assert "not needed" in status and "missing" not in status and "waiting" not in status


@pytest.mark.parametrize(
    ("gone", "run_again"),
    [
        (["recover"], {"recover"}),
        (["importance", "prune", "recover"], {"importance", "prune", "recover"}),
        (["evaluate", "reference"], {"evaluate", "reference"}),
    ],
)
def test_a_row_without_checkpoint_or_scores_is_made_again_from_what_it_needs(config, tmp_path, gone, run_again):
    out = tmp_path / "out"
    done(config, out)
    for kind in gone:
        shutil.rmtree(out / "store" / kind)
    assert planned_actions(config, out)["run"] == run_again


def test_a_pass_with_further_criteria_is_wanted_for_itself(config, tmp_path):
    out = tmp_path / "out"
    done(config, out)
    assert planned_actions(config, out, "--criteria", "surgeon")["run"] == set(), "the method's own"
    actions = planned_actions(config, out, "--criteria", "magnitude")
    assert actions["run"] == {"importance"} and actions["not needed"] == set()


def test_rows_of_other_ratios_models_and_methods_stay(config, tmp_path):
    out = tmp_path / "out"
    done(config, out, "--models", "alpha", "--ratios", "0.2", models=["alpha"], ratios=[0.2])
    assert labels(out) == ["alpha dense", "alpha dense + lora", "alpha 0.2 + lora"]
    shown = done(config, out, "--models", "alpha", "--ratios", "0.1", models=["alpha"], ratios=[0.1])
    assert labels(out) == ["alpha dense", "alpha dense + lora", "alpha 0.1 + lora", "alpha 0.2 + lora"]
    assert "rows of earlier runs: alpha 0.2 + lora" in shown and "--forget 'alpha 0.2 + lora'" in shown
    done(config, out, "--models", "beta", "--ratios", "0.1", models=["beta"], ratios=[0.1])
    assert labels(out)[4:] == ["beta dense", "beta dense + lora", "beta 0.1 + lora"]
    method = ["--models", "alpha", "--ratios", "0.2", "--methods", "hfprune"]
    shown = done(config, out, *method, models=["alpha"], ratios=[0.2], methods=["hfprune"])
    assert labels(out)[2:5] == [
        "alpha 0.1 surgeon-uniform-block + lora",
        "alpha 0.2 surgeon-uniform-block + lora",
        "alpha 0.2 hfprune + lora",
    ]
    assert len(set(labels(out))) == len(labels(out)) == 8
    again = labels(out)
    done(config, out, *method, models=["alpha"], ratios=[0.2], methods=["hfprune"])
    assert labels(out) == again, "the order is stable"
    assert run(out, command=report)[0] == 0 and labels(out) == again
    assert all(run("--out", out, "--logs", label)[0] == 0 for label in again)


def test_todays_row_replaces_the_one_of_other_settings(config, tmp_path):
    out = tmp_path / "out"
    done(config, out)
    evaluations = {cell.label: cell.evaluate for cell in planned(config)[1].cells}
    shown = done(config, out, "--set", "calibration.samples=4", "--ratios", "0.2", calibration__samples=4, ratios=[0.2])
    assert labels(out) == list(evaluations), "one row each"
    record = {cell["label"]: cell["evaluate"] for cell in json.loads((out / "sweep.json").read_text())["cells"]}
    changed = {label for label, evaluate in record.items() if evaluate != evaluations[label]}
    assert changed == {"alpha 0.2 + lora", "beta 0.2 + lora"}
    assert "rows of earlier runs: alpha 0.1 + lora, beta 0.1 + lora" in shown and "not to be compared" not in shown
    other_text = {"evaluation__fidelity__windows": 3, "ratios": [0.2]}
    shown = done(config, out, "--set", "evaluation.fidelity.windows=3", "--ratios", "0.2", **other_text)
    assert "since measured in another way: alpha 0.1 + lora, beta 0.1 + lora" in " ".join(shown.split())
    assert "since measured in another way: alpha 0.1 + lora, beta 0.1 + lora" in (out / "results.md").read_text()


@pytest.fixture
def no_stages(monkeypatch):
    """Fail if a stage begins that should have been refused."""
    monkeypatch.setattr("hfprune_launch.local.backend.LocalBackend.run", lambda *_: pytest.fail("a stage has begun"))


@pytest.fixture
def namesake(config, tmp_path):
    """Another checkpoint in a folder of the same name; the path to it."""
    (tmp_path / "elsewhere").mkdir()
    return shutil.copytree(config.with_name("beta"), tmp_path / "elsewhere" / "alpha")


@pytest.fixture
def of_folders(config, tmp_path):
    """A configuration without aliases."""
    file = tmp_path / "of folders.yaml"
    settings = load_config([config], {"models": [str(config.with_name("alpha"))], "aliases": {}}).model_dump()
    file.write_text(to_yaml(settings))
    return file


ANOTHER_WAY = {
    "another ratio": (["--ratios", "0.2"], ["'alpha 0.1 + lora'"]),
    "no recovery": (
        ["--ratios", "0.1", "--set", "recovery.method=none"],
        ["'alpha dense + lora'", "'alpha 0.1 + lora'"],
    ),
}


@pytest.mark.usefixtures("no_stages")
@pytest.mark.parametrize(("settings", "stay"), ANOTHER_WAY.values(), ids=ANOTHER_WAY)
@pytest.mark.parametrize("mode", [[], ["--dry-run"]], ids=["run", "dry run"])
def test_rows_of_another_checkpoint_with_the_same_name_are_refused(
    of_folders, namesake, tmp_path, settings, stay, mode
):
    """Their shares and model cards would be those of today's model."""
    out = tmp_path / "out"
    done(of_folders, out, "--ratios", "0.1", ratios=[0.1])
    before = {path: path.lstat().st_mtime_ns for path in out.rglob("*")}
    code, _, said = run("--config", of_folders, "--out", out, "--models", namesake, *settings, *mode)
    assert code == 2 and "Traceback" not in said
    assert f"--out {out}: its rows {', '.join(stay)}, which stay" in said
    assert all(f"--forget {label}" in said for label in stay) and said.count("--forget") == len(stay)
    assert f"'alpha' ({namesake})" in said
    assert {path: path.lstat().st_mtime_ns for path in out.rglob("*")} == before


@pytest.mark.parametrize("remedy", ["all replaced", "forgotten", "an alias"])
def test_a_checkpoint_may_have_the_name_of_another_whose_rows_are_gone(of_folders, namesake, tmp_path, remedy):
    out, wanted = tmp_path / "out", {"models": [str(namesake)], "ratios": [0.2]}
    done(of_folders, out, "--ratios", "0.1", ratios=[0.1])
    asked = ["--models", namesake]
    if remedy == "all replaced":
        wanted["ratios"] = [0.1, 0.2]
    elif remedy == "forgotten":
        assert run("--out", out, "--forget", "alpha 0.1 + lora")[0] == 0
    else:
        asked = ["--set", f"aliases.other.path={namesake}", "--models", "other"]
        wanted |= {"models": ["other"], "aliases.other.path": str(namesake)}
    done(of_folders, out, *asked, "--ratios", ",".join(map(str, wanted["ratios"])), **wanted)
    rows = [label for label in labels(out) if "0." in label]
    stays = ["alpha 0.1 + lora"] if remedy == "an alias" else []
    name = "other" if remedy == "an alias" else "alpha"
    assert rows == [*stays, *(f"{name} {ratio} + lora" for ratio in wanted["ratios"])]
    dense = next(row for row in csv.DictReader((out / "results.csv").open()) if row["label"] == f"{name} dense")
    assert int(dense["parameters"]) == open_checkpoint(namesake).parameters


def test_speed_is_of_the_device_on_which_the_sweep_ran(config, tmp_path, monkeypatch):
    """On another device the sweep's state can be viewed; a run there would measure again, and do nothing else."""
    out, asked = tmp_path / "out", ["--set", "efficiency.enabled=true"]
    monkeypatch.setattr(sweep_plan, "device_here", lambda _: "this machine")
    shown = done(config, out, *asked, efficiency__enabled=True, device="this machine")
    assert "speed" in shown and "1.50" in shown and "batch 4, 32 in, 16 out" in shown
    measured = {row["decode_speed"] for row in csv.DictReader((out / "results.csv").open())}
    assert measured == {"1.5"} and planned_actions(config, out, *asked)["run"] == set()

    monkeypatch.setattr(sweep_plan, "device_here", lambda _: "another machine")
    code, status, _ = run("--config", config, "--out", out, "--status", *asked)
    assert code == 0 and "missing" not in status and "efficiency" in status
    assert planned_actions(config, out, *asked)["run"] == {"efficiency"}
    assert planned_actions(config, out)["run"] == set(), "which nobody asks for"


def test_a_row_is_removed_on_purpose(config, tmp_path):
    out = tmp_path / "out"
    done(config, out)
    code, shown, _ = run("--out", out, "--forget", "alpha 0.1 + lora", "--forget", "beta dense")
    assert code == 0 and "removed: alpha 0.1 + lora, beta dense" in shown
    assert len(labels(out)) == 6 and not {"alpha 0.1 + lora", "beta dense"} & set(labels(out))
    before = (out / "sweep.json").read_bytes()
    code, _, said = run("--out", out, "--forget", "alpha 0.3 + lora")
    assert code == 2 and "no row 'alpha 0.3 + lora'" in said and "did you mean" in said and "Traceback" not in said
    assert (out / "sweep.json").read_bytes() == before
    assert run("--out", tmp_path / "never", "--forget", "x")[0] == 2 and not (tmp_path / "never").exists()
    assert list((out / "store" / "prune").iterdir()), "artifacts stay"


def test_what_nobody_reads_to_its_end_is_written_before(config, tmp_path, monkeypatch):
    """A reader of the output such as head ends a command where it shows its table."""
    out = tmp_path / "out"
    done(config, out)
    (out / "report.html").unlink()
    shutil.rmtree(out / "checkpoints")

    class ClosedError(Exception):
        pass

    def closed(*_):
        raise ClosedError

    monkeypatch.setattr(screen, "show_table", closed)
    with pytest.raises(ClosedError):
        run("--out", out, "--forget", "alpha 0.1 + lora")
    assert (out / "report.html").exists() and list((out / "checkpoints").glob("[!.]*"))


@pytest.mark.parametrize("record", ["as it is", "removed"])
def test_a_row_that_was_forgotten_while_the_sweep_ran_does_not_come_back_at_its_end(
    config, tmp_path, monkeypatch, record
):
    """If meanwhile the record of all rows was lost, the sweep's own rows are recorded again."""
    out = tmp_path / "out"
    done(config, out)
    before = labels(out)

    def meanwhile(*_):
        assert run("--out", out, "--forget", "alpha 0.1 + lora")[0] == 0
        if record == "removed":
            (out / "sweep.json").unlink()

    monkeypatch.setattr(sweep_run, "_clean_up", meanwhile)
    assert run("--config", config, "--out", out)[0] == 0
    left = [label for label in before if label != "alpha 0.1 + lora"] if record == "as it is" else before
    assert labels(out) == left == [cell.label for cell in read_record(out).plan.cells]
    assert (out / "checkpoints" / "alpha-0.1-surgeon-uniform-block-lora").exists() == (left == before)


@pytest.mark.parametrize("command", ["sweep", "forget"])
def test_of_two_commands_that_change_the_record_at_once_neither_undoes_the_other(
    config, tmp_path, monkeypatch, command
):
    """Between what a command reads of the record and what it writes, another one would remove a row."""
    out = tmp_path / "out"
    done(config, out)
    before, write = labels(out), sweep_folder.write_record
    forgets = partial(sweep_folder.forget_rows, out, ["alpha 0.1 + lora"])
    others = [threading.Thread(target=forgets)]

    def write_while_another_forgets(*record):
        if not others[0].ident:
            others[0].start()
            others[0].join(2)
        write(*record)

    for module in (sweep_run, sweep_folder):
        monkeypatch.setattr(module, "write_record", write_while_another_forgets)
    own = ["--ratios", "0.2", "--config", config] if command == "sweep" else ["--forget", "beta dense"]
    assert run("--out", out, *own)[0] == 0
    others[0].join()
    gone = {"alpha 0.1 + lora"} | ({"beta dense"} if command == "forget" else set())
    assert [cell.label for cell in read_record(out).plan.cells] == [it for it in before if it not in gone]


def test_a_damaged_record_loses_rows_aloud_and_keeps_nothing_from_running(config, tmp_path):
    out = tmp_path / "out"
    done(config, out, "--ratios", "0.1", ratios=[0.1])
    (out / "sweep.json").write_text('{"stages": 3')
    shown = done(config, out, "--ratios", "0.2", ratios=[0.2])
    assert "rows of earlier runs are lost" in shown and "sweep.json: damaged" in shown and len(labels(out)) == 6
    assert "kept as sweep.json.unread-1" in shown and (out / "sweep.json.unread-1").read_text() == '{"stages": 3'


def test_without_a_config_the_folder_has_its_own(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    done(config, out)
    monkeypatch.chdir(tmp_path)
    code, shown, said = run("--out", "out")
    assert (code, said) == (0, "") and "configuration: out/config.yaml, of the last run in this folder" in shown
    assert len(labels(out)) == 8
    fill(out, planned(config, ratios=[0.25])[1])
    code, shown, _ = run("--out", out, "--ratios", "0.25")
    assert code == 0 and "with this command's settings over it" in shown and len(labels(out)) == 10
    assert yaml.safe_load((out / "config.yaml").read_text())["ratios"] == [0.25]
    for instead in (["--status"], ["--logs", "alpha 0.25 + lora"], ["--dry-run"]):
        code, shown, _ = run("--out", out, *instead)
        assert code == 0 and "alpha" in shown and "llama" not in shown, instead
    assert "configuration:" not in run("--config", config, "--out", out, "--status")[1]


def test_a_model_that_is_a_folder_here_is_found_from_elsewhere(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    plain = yaml.safe_load(config.read_text()) | {"aliases": {}, "models": ["alpha"]}
    file = config.with_name("plain.yaml")
    file.write_text(yaml.safe_dump(plain))
    monkeypatch.chdir(config.parent)
    done(file, out)
    monkeypatch.chdir(tmp_path)
    code, _, said = run("--out", out)
    assert (code, said) == (0, "")


@pytest.mark.parametrize("content", ["models: [a\n", ""])
def test_a_damaged_configuration_is_one_message(config, tmp_path, content):
    out = tmp_path / "out"
    out.mkdir()
    (out / "config.yaml").write_text(content)
    for instead in ([], ["--status"], ["--dry-run"], ["--logs", "x"]):
        code, _, said = run("--out", out, *instead)
        assert code == 2 and "config.yaml" in said and "give --config" in said and "Traceback" not in said
    assert [it.name for it in out.iterdir()] == ["config.yaml"], "nothing is written"


def test_a_comparison_shows_a_few_columns_and_writes_all(config, tmp_path):
    out, both = tmp_path / "out", tmp_path / "both"
    done(config, out, "--models", "alpha", models=["alpha"])
    for artifact in (out / "store" / "importance").iterdir():
        save_file({f"layers.0.{name}": np.arange(8.0) for name in ("entropy", "surgeon")}, artifact / SCORES)
    for wide in ([], ["--wide"]):
        code, shown, said = run(out, "--out", both, *wide, command=compare)
        head = shown.splitlines()[0].split()
        assert code == 0, said
        assert ("memory" in head) == bool(wide) and "agree" in head and "entropy / surgeon" in shown
    assert "| memory |" in (both / "comparison.md").read_text()


def seed_of(config, out, seed=0, device="", **overrides):
    """Finish a sweep of one model with this seed; dots in keys are written as ``__``."""
    overrides = {"models": ["alpha"], "ratios": [0.1], "seed": seed} | overrides
    settings = [f"{key.replace('__', '.')}={to_yaml(value, flow=True)}" for key, value in overrides.items()]
    done(config, out, *(word for setting in settings for word in ("--set", setting)), device=device, **overrides)
    for artifact in (out / "store" / "importance").iterdir():
        save_file({f"layers.0.{name}": np.arange(8.0) for name in ("entropy", "surgeon")}, artifact / SCORES)
    return out


def test_a_comparison_names_rows_that_were_measured_otherwise(config, tmp_path):
    """A row of an earlier run stands beside those of the last one."""
    one, two = seed_of(config, tmp_path / "one"), seed_of(config, tmp_path / "two", 1)
    other = seed_of(config, tmp_path / "other", 2, ratios=[0.2], evaluation__fidelity__windows=3)
    seed_of(config, other, 2)
    for second, told in ((two, False), (other, True)):
        both = tmp_path / f"with {second.name}"
        code, shown, said = run(one, second, "--out", both, command=compare)
        assert code == 0, said
        for text in (shown, (both / "comparison.md").read_text()):
            named = "measured in another way" in text and f"{second}: alpha 0.2 + lora" in text
            assert named == told and f"{one}: alpha" not in text


@pytest.mark.parametrize("overrides", [{"calibration__samples": 4}, {"evaluation__fidelity__windows": 3}])
def test_rows_of_other_settings_do_not_pass_for_other_seeds(config, tmp_path, overrides):
    one, two = seed_of(config, tmp_path / "one"), seed_of(config, tmp_path / "two", 1, **overrides)
    code, shown, said = run(one, two, "--out", tmp_path / "both", command=compare)
    (key,) = (key.rpartition("__")[2] for key in overrides)
    assert code == 2 and not shown and f"{two}: its row 'alpha" in said and key in said
    assert not (tmp_path / "both").exists()


def test_seeds_of_one_configuration_are_compared_wherever_and_beside_whatever_they_ran(config, tmp_path, monkeypatch):
    moved = shutil.copytree(config.parent, tmp_path / "moved")
    calibration = (moved / "calibration.jsonl").rename(moved / "renamed.jsonl")
    machine = {"efficiency__enabled": True, "runtime__ranks": 1, "recovery__micro_batch_size": 2}
    paths = {"calibration__path": str(calibration), "evaluation__include_path": str(config.with_name("tasks"))}
    others = {"ratios": [0.1, 0.2], "methods": ["hfprune", "surgeon-uniform-block"], "models": ["alpha", "beta"]}
    folders = []
    for seed, (device, file, overrides) in enumerate(
        [
            ("one machine", config, {"efficiency__enabled": True}),
            ("another", moved / config.name, machine | paths),
            ("", config, others),
        ]
    ):
        monkeypatch.setattr(sweep_plan, "device_here", lambda _, device=device: device)
        folders.append(seed_of(file, tmp_path / str(seed), seed, device, **overrides))
    code, _, said = run(*folders, "--out", tmp_path / "all", command=compare)
    assert code == 0, said
    methods = json.loads((tmp_path / "all" / "comparison.json").read_text())["methods"]
    counts = {(it["model"], it["ratio"], it["method"], it["recovery"]): it["sweeps"] for it in methods}
    shared = [("dense", "none", 0.0), ("dense", "lora", 0.0), ("surgeon-uniform-block", "lora", 0.1)]
    in_all = {key for key, count in counts.items() if count == len(folders)}
    assert in_all == {("alpha", ratio, method, recovery) for method, recovery, ratio in shared}
    assert len(counts) > len(in_all) and {count for key, count in counts.items() if key not in in_all} == {1}


def test_models_that_only_share_a_name_are_not_compared(config, tmp_path):
    """Their rows would otherwise pass for two seeds of one model."""
    other = config.with_name("other.yaml")
    other.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"aliases": {"alpha": {"path": "beta"}}}))
    for file, out in ((config, tmp_path / "one"), (other, tmp_path / "two")):
        asked = ("--models", "alpha", "--ratios", 0.1)
        done(file, out, *asked, models=["alpha"], ratios=[0.1])
    code, _, said = run(tmp_path / "one", tmp_path / "two", "--out", tmp_path / "both", command=compare)
    assert code == 2 and f"{tmp_path / 'two'}: its row 'alpha dense' differs from that of" in said
    assert not (tmp_path / "both").exists()


def test_a_row_counts_once_however_many_sweeps_have_it(config, tmp_path):
    for name, seed in (("one", 0), ("two", 1), ("three", 1)):
        done(config, tmp_path / name, "--models", "alpha", "--set", f"seed={seed}", models=["alpha"], seed=seed)
    folders = {name: tmp_path / name for name in ("one", "two", "three")}
    for artifact in (folders["one"] / "store" / "importance").iterdir():
        save_file({"layers.0.entropy": np.arange(8.0)}, artifact / SCORES)
    code, _, said = run(folders["one"], folders["two"], "--out", tmp_path / "both", command=compare)
    assert code == 0, said
    code, _, said = run(*folders.values(), "--out", tmp_path / "all", command=compare)
    assert code == 2 and f"{folders['three']}: its row 'alpha dense + lora' is the same as in {folders['two']}" in said
    assert not (tmp_path / "all").exists()


def test_somebody_elses_sweep_is_looked_at_without_its_models_and_without_writing(config, tmp_path, monkeypatch):
    done(config, tmp_path)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    def refuse(*_):
        raise PermissionError(13, "Permission denied", "model")

    monkeypatch.setattr(sweep_plan, "resolve_models", refuse)
    for given in (["--config", config], []):
        for looking in (["--status"], ["--logs", "alpha dense + lora"]):
            code, shown, said = run(*given, "--out", tmp_path, *looking)
            assert (code, said) == (0, "") and "note" not in shown, looking
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_settings_with_which_nothing_can_be_planned_are_left_out_with_a_note(config, tmp_path):
    done(config, tmp_path)
    for looking in (["--status"], ["--cancel"]):
        for given in (["--ratios", "7"], ["--set", "evaluation.fidelity.windows=0"]):
            code, shown, said = run("--out", tmp_path, *given, *looking)
            assert (code, said) == (0, "") and "note: this command's settings are left out" in shown


def test_a_lost_configuration_is_not_taken_for_the_defaults(config, tmp_path):
    done(config, tmp_path)
    (tmp_path / "config.yaml").unlink()
    code, _, said = run("--out", tmp_path, "--dry-run")
    assert code == 2 and f"{tmp_path / 'config.yaml'} is missing" in said and "give --config" in said
    for whole in (["--status"], ["--config", config, "--dry-run"]):
        assert run("--out", tmp_path, *whole)[0] == 0


def test_somebody_elses_tables_are_shown_where_nothing_can_be_written(config, tmp_path, monkeypatch):
    done(config, tmp_path)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, shown, said = run(tmp_path, command=report)
    assert code == 0 and "alpha  dense" in shown and f"{tmp_path} can't be written to" in shown, said
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
