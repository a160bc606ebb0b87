"""Rows of a folder stay until they are removed, even if what their results rest on is gone; no stage runs here."""

import csv
import json
import os
import re
import shutil
import threading
from functools import partial

import pytest
import yaml
from hfprune_launch import compare, report, sweep, sweep_folder
from hfprune_launch import run as sweep_run
from hfprune_launch.sweep_folder import Sweep, recorded_sweep
from rows import make_artifact
from sweeps import in_process, planned

from hfprune_dist.checkpoints.checkpoint import open_checkpoint
from hfprune_dist.config.load import load_config
from hfprune_dist.config.yaml_text import to_yaml
from hfprune_dist.report import page
from hfprune_dist.store.artifacts import Store

ALPHA, ALPHA_2, BETA = (f"{name} surgeon-uniform-block + lora" for name in ("alpha 0.1", "alpha 0.2", "beta 0.1"))


def fill(out, wanted):
    """Write artifacts for all stages of a plan, as if they had run."""
    store = Store(out / "store")
    for stage in wanted.stages.values():
        if store.handle(stage.id).manifest() is None:
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
    return [row["label"] for row in json.loads((out / "results.json").read_text())["rows"]]


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


def test_what_results_stand_on_is_not_made_again(config, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_run.WarmProcess, "begin", lambda _: pytest.fail("there is nothing to import for"))
    out, gone = tmp_path / "out", ["importance", "reference", "prune"]
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


def test_rows_of_other_ratios_models_and_methods_stay(config, tmp_path):
    out = tmp_path / "out"
    done(config, out, "--models", "alpha", "--ratios", "0.2", models=["alpha"], ratios=[0.2])
    assert labels(out) == ["alpha dense", "alpha dense + lora", ALPHA_2]
    shown = done(config, out, "--models", "alpha", "--ratios", "0.1", models=["alpha"], ratios=[0.1])
    assert labels(out) == ["alpha dense", "alpha dense + lora", ALPHA, ALPHA_2]
    assert f"rows of earlier runs: {ALPHA_2}" in shown and f"--forget '{ALPHA_2}'" in shown
    done(config, out, "--models", "beta", "--ratios", "0.1", models=["beta"], ratios=[0.1])
    assert labels(out)[4:] == ["beta dense", "beta dense + lora", BETA]
    method = ["--models", "alpha", "--ratios", "0.2", "--methods", "hfprune"]
    shown = done(config, out, *method, models=["alpha"], ratios=[0.2], methods=["hfprune"])
    assert labels(out)[2:5] == [ALPHA, ALPHA_2, "alpha 0.2 hfprune + lora"]
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
    assert changed == {ALPHA_2, BETA.replace("0.1", "0.2")}
    assert f"rows of earlier runs: {ALPHA}, {BETA}" in shown and "not to be compared" not in shown
    other_text = {"evaluation__fidelity__windows": 3, "ratios": [0.2]}
    shown = done(config, out, "--set", "evaluation.fidelity.windows=3", "--ratios", "0.2", **other_text)
    assert f"measured otherwise, or with other libraries: {ALPHA}, {BETA}" in " ".join(shown.split())
    assert f"measured otherwise, or with other libraries: {ALPHA}, {BETA}" in (out / "results.md").read_text()


def test_rows_of_another_checkpoint_with_the_same_name_are_refused(config, tmp_path, monkeypatch):
    """Their shares and model cards would be those of today's model."""
    monkeypatch.setattr("hfprune_launch.local.backend.LocalBackend.run", lambda *_: pytest.fail("a stage has begun"))
    out, namesake = tmp_path / "out", shutil.copytree(config.with_name("beta"), tmp_path / "elsewhere" / "alpha")
    file = tmp_path / "of folders.yaml"
    settings = load_config([config], {"models": [str(config.with_name("alpha"))], "aliases": {}}).model_dump()
    file.write_text(to_yaml(settings))
    done(file, out, "--ratios", "0.1", ratios=[0.1])
    before = {path: path.lstat().st_mtime_ns for path in out.rglob("*")}
    for mode in ([], ["--dry-run"]):
        code, _, said = run("--config", file, "--out", out, "--models", namesake, "--ratios", "0.2", *mode)
        assert code == 2 and f"--out {out}: its row '{ALPHA}', which" in said
        assert f"--forget '{ALPHA}'" in said and f"'alpha' ({namesake})" in said
    assert {path: path.lstat().st_mtime_ns for path in out.rglob("*")} == before
    assert run("--out", out, "--forget", ALPHA)[0] == 0
    done(file, out, "--models", namesake, "--ratios", "0.2", models=[str(namesake)], ratios=[0.2])
    assert [label for label in labels(out) if "0." in label] == [ALPHA_2]
    dense = next(row for row in csv.DictReader((out / "results.csv").open()) if row["label"] == "alpha dense")
    assert int(dense["parameters"]) == open_checkpoint(namesake).parameters


def test_a_row_is_removed_on_purpose(config, tmp_path):
    out = tmp_path / "out"
    done(config, out)
    code, shown, _ = run("--out", out, "--forget", ALPHA, "--forget", "beta dense")
    assert code == 0 and f"removed: {ALPHA}, beta dense" in shown
    assert len(labels(out)) == 6 and not {ALPHA, "beta dense"} & set(labels(out))
    before = (out / "sweep.json").read_bytes()
    code, _, said = run("--out", out, "--forget", "alpha 0.3 hfprune + lora")
    assert code == 2 and "no row 'alpha 0.3 hfprune + lora'" in said and "did you mean" in said
    assert (out / "sweep.json").read_bytes() == before
    assert run("--out", tmp_path / "never", "--forget", "x")[0] == 2 and not (tmp_path / "never").exists()
    code, shown, _ = run("--config", config, "--out", out)
    assert code == 0 and "stages to run" not in shown and len(labels(out)) == 8, "artifacts stay"


def test_a_row_that_was_forgotten_while_the_sweep_ran_does_not_come_back_at_its_end(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    done(config, out)
    left = [label for label in labels(out) if label != ALPHA]
    forgets = partial(run, "--out", out, "--forget", ALPHA)
    monkeypatch.setattr(sweep_run, "_clean_up", lambda *_: forgets())
    assert run("--config", config, "--out", out)[0] == 0
    assert labels(out) == left == [cell.label for cell in recorded_sweep(out).plan.cells]
    assert not (out / "checkpoints" / "alpha-0.1-surgeon-uniform-block-lora").exists()


def test_of_two_commands_that_change_the_record_at_once_neither_undoes_the_other(config, tmp_path, monkeypatch):
    """Between what a command reads of the record and what it writes, another one would remove a row."""
    out = tmp_path / "out"
    done(config, out)
    before, write = labels(out), Sweep.write_record
    other = threading.Thread(target=partial(sweep_folder.forget_rows, out, [ALPHA]))

    def write_while_another_forgets(record):
        if not other.ident:
            other.start()
            other.join(0.3)
        write(record)

    monkeypatch.setattr(Sweep, "write_record", write_while_another_forgets)
    assert run("--out", out, "--ratios", "0.2", "--config", config)[0] == 0
    other.join()
    assert [cell.label for cell in recorded_sweep(out).plan.cells] == [label for label in before if label != ALPHA]


@pytest.mark.parametrize("damage", ["text", "lost model", "lost stage", "other version"])
def test_a_damaged_record_is_one_message(config, tmp_path, damage):
    out = tmp_path / "out"
    done(config, out, "--ratios", "0.1", ratios=[0.1])
    record = json.loads((out / "sweep.json").read_text())
    if damage == "other version":
        record["stages"][0]["fingerprint"] = "of other settings"
    else:
        record["dense" if damage == "lost model" else "stages"] = {} if damage == "lost model" else record["stages"][1:]
    (out / "sweep.json").write_text('{"stages": 3' if damage == "text" else json.dumps(record))
    for command, given in ((sweep, ["--out", out, "--config", config]), (report, [out])):
        code, _, said = run(*given, command=command)
        assert code == 2 and "sweep.json: damaged or another version's; remove it" in said


def test_without_a_config_the_folder_has_its_own(config, tmp_path, monkeypatch):
    out = tmp_path / "out"
    done(config, out)
    monkeypatch.chdir(tmp_path)
    code, shown, said = run("--out", "out")
    assert (code, said) == (0, "") and "configuration: out/config.yaml, of the last run in this folder" in shown
    assert len(labels(out)) == 8
    fill(out, planned(config, ratios=[0.25])[1])
    code, shown, _ = run("--out", out, "--ratios", "0.25")
    assert code == 0 and "overridden by this command's settings" in shown and len(labels(out)) == 10
    for written in ((out / "config.yaml").read_text(), run("--out", out, "--show-config")[1]):
        assert yaml.safe_load(written)["ratios"] == [0.25]
    for instead in (["--status"], ["--logs", "alpha 0.25 surgeon-uniform-block + lora"], ["--dry-run"]):
        code, shown, _ = run("--out", out, *instead)
        assert code == 0 and "alpha" in shown and "llama" not in shown, instead
    assert "configuration:" not in run("--config", config, "--out", out, "--status")[1]


def seed_of(config, out, seed=0, device="", **overrides):
    """Finish a sweep of one model with this seed; dots in keys are written as ``__``."""
    overrides = {"models": ["alpha"], "ratios": [0.1], "seed": seed} | overrides
    settings = [f"{key.replace('__', '.')}={json.dumps(value)}" for key, value in overrides.items()]
    done(config, out, *(word for setting in settings for word in ("--set", setting)), device=device, **overrides)
    return out


def test_rows_of_other_settings_do_not_pass_for_other_seeds(config, tmp_path):
    one, two = seed_of(config, tmp_path / "one"), seed_of(config, tmp_path / "two", 1)
    assert run(one, two, "--out", tmp_path / "all", command=compare)[0] == 0
    for seed, changes, told in ((0, {}, "its seed is"), (1, {"calibration__samples": 4}, "calibration.samples is 4")):
        other = seed_of(config, tmp_path / "other", seed, **changes)
        code, shown, said = run(one, other, "--out", tmp_path / "both", command=compare)
        assert code == 2 and not shown and f"{other}" in said and told in said
    recipes = seed_of(config, tmp_path / "recipes", 2, recovery__recipes={"lora": {"rank": 4}})
    for sweeps in ((one, recipes), (recipes, one)):
        code, _, said = run(*sweeps, "--out", tmp_path / "both", command=compare)
        assert code == 2 and "more than the seed: recovery.recipes" in said
    assert not (tmp_path / "both").exists()


def test_a_report_that_can_not_be_written_ends_nothing(config, tmp_path, monkeypatch):
    monkeypatch.setattr(page, "Ledger", lambda *_: {}["broken"])
    assert "report.html can't be written (KeyError: 'broken')" in done(config, tmp_path)


def test_somebody_elses_tables_are_shown_where_nothing_can_be_written(config, tmp_path, monkeypatch):
    done(config, tmp_path)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    code, shown, said = run(tmp_path, command=report)
    assert code == 0 and "alpha dense" in shown and f"{tmp_path} can't be written to" in shown, said
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before
