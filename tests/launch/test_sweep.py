"""The whole sweep on real ranks: results, resumption, and death at any moment."""

import itertools
import json
import os
import re
import shutil
import subprocess
from contextlib import contextmanager

import psutil
import pytest
import yaml
from clusters import Submitted, wait_for
from fork_server import forked
from huggingface_hub import ModelCard
from ranks import FAULTS, ROOT, killing
from sweeps import artifacts, command, finish, id_of, loaded_by_its_card, results, sweep
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.slow


ONE_CELL = ["--models", "alpha", "--ratios", "0.2", "--ranks", "1"]
WITHOUT_RECOVERY = [*ONE_CELL, "--set", "recovery.method=none"]
# What the cell's row stands on, in order; its baselines stand on others.
CELL = "alpha 0.2 surgeon-uniform-block"
SCORES, PRUNE, RECOVER, EVALUATE = (
    "importance alpha",
    f"prune {CELL}",
    f"recover {CELL} + lora",
    f"evaluate {CELL} + lora",
)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    """An undisturbed sweep, with whose results every fault below must end."""
    out = tmp_path_factory.mktemp("finished") / "out"
    return out, finish(config, out, *ONE_CELL)


@pytest.fixture
def short_of(finished, tmp_path):
    """Make a copy of the finished sweep that lacks the artifacts of some stages and the record of its rows."""

    def copy(*stages):
        out = tmp_path / "out"
        shutil.copytree(finished[0], out)
        for stage in stages:
            shutil.rmtree(out / "store" / id_of(finished[0], stage))
        shutil.rmtree(out / "store" / "work", ignore_errors=True)
        shutil.rmtree(out / "logs")
        (out / "sweep.json").unlink()
        return out

    return copy


def assert_same_as(finished_out, out):
    """Check that scores, pruned weights and recovered weights are equal bit for bit, whatever happened on the way."""
    for kind in ("importance", "prune", "recover"):
        ours, theirs = artifacts(out, kind), artifacts(finished_out, kind)
        assert ours and all(theirs[name] == content for name, content in ours.items())


def test_one_row_per_cell_with_its_baselines_and_where_all_comes_from(finished):
    out, result = finished
    rows = results(out)
    assert [(row["model"], row["ratio"], row["recovery"]) for row in rows] == [
        ("alpha", "0.0", "none"),
        ("alpha", "0.0", "lora"),
        ("alpha", "0.2", "lora"),
    ]
    assert {row["status"] for row in rows} == {"done"}
    for row in rows:
        assert float(row["perplexity"]) > 1 and 0 <= float(row["top1_agreement"]) <= 1
        assert 0 <= float(row["tiny_choice/acc"]) <= 1 and row["tiny_choice/acc_stderr"]
    dense, control, pruned = rows
    assert float(dense["kl"]) == 0 and float(dense["top1_agreement"]) == 1
    assert float(control["kl"]) > 0 and float(pruned["kl"]) > float(control["kl"])
    assert int(pruned["parameters"]) < int(dense["parameters"])
    assert float(pruned["ratio_reached"]) == pytest.approx(0.2, abs=0.01)
    assert all(f"  {out / row['checkpoint']}\n" in result.stdout for row in (control, pruned))
    resolved = yaml.safe_load((out / "config.yaml").read_text())
    manifest = json.loads(next((out / "store" / "prune").glob("*/manifest.json")).read_text())
    assert manifest["config"].items() >= resolved.items() and manifest["provenance"]["packages"]["torch"]


# Anything slower than this hangs; the limit is generous because other tests share a slow machine.
PATIENCE_MS = 600_000


@contextmanager
def opened(file):
    """Open a file in headless Chromium, Debian's own; yield its page, the errors that it reports and the addresses that
    it requests. Without a browser the test is skipped, or fails where CI is set.
    """
    errors, requests = [], []
    chromium = shutil.which("chromium")
    if chromium is None:
        message = "Chromium is not installed; on Debian, as root: apt-get install chromium"
        (pytest.fail if os.environ.get("CI") else pytest.skip)(message)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # Chromium's sandbox refuses to start as root, and CI runs as root.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"], timeout=PATIENCE_MS)
        page = browser.new_page(viewport={"width": 1280, "height": 900})
        page.set_default_timeout(PATIENCE_MS)
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(file.resolve().as_uri())
        yield page, errors, requests
        browser.close()


def test_its_report_shows_the_numbers_of_its_table(finished):
    """In a browser, from the file alone; the table sorts and shows all columns, and no window is too narrow."""
    out, _ = finished
    rows = results(out)
    with opened(out / "report.html") as (page, errors, requests):
        assert f"KL {float(rows[-1]['kl']):.3f}" in page.inner_text(".finding")
        page.click("#rows button[title=kl]")
        page.click("#rows button[title=kl]")
        sorted_rows = page.eval_on_selector_all("#rows tbody tr", "rows => rows.map(row => row.cells[0].dataset.v)")
        by_kl = sorted(rows, key=lambda row: -float(row["kl"]))
        assert sorted_rows == [row["label"] for row in by_kl]
        assert not page.is_visible("#rows button[title=measured_as]")
        page.check("#all-columns")
        assert page.is_visible("#rows button[title=measured_as]")
        for width in (375, 1280):
            page.set_viewport_size({"width": width, "height": 900})
            assert page.evaluate("document.documentElement.scrollWidth") == width
        assert errors == [] and requests == [(out / "report.html").resolve().as_uri()]


def test_checkpoints_load_by_their_names_and_have_a_card_and_no_path_of_this_machine(finished, config):
    out, _ = finished
    places = [str(place).encode() for place in (out, config.parent)]
    for row in results(out)[1:]:
        folder = out / row["checkpoint"]
        ratio = "0.2-surgeon-uniform-block" if row["method"] else "dense"
        assert folder == out / "checkpoints" / f"alpha-{ratio}-lora"
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert sum(p.numel() for p in model.parameters()) == int(row["parameters"])
        files = [file for file in folder.rglob("*") if file.is_file()]
        assert {"README.md", "config.json", "model.safetensors", "tokenizer.json"} <= {file.name for file in files}
        assert not [file for file in files for place in places if place in file.read_bytes()]
        card = ModelCard.load(folder / "README.md")
        assert next(result.metric_value for result in card.data.eval_results if result.metric_type == "kl") == float(
            row["kl"]
        )


def test_checkpoints_that_were_copied_elsewhere_load_by_their_cards_and_need_no_sweep(finished, tmp_path):
    sweep_folder = shutil.copytree(finished[0], tmp_path / "sweep")
    elsewhere = shutil.copytree(sweep_folder / "checkpoints", tmp_path / "elsewhere", symlinks=True)
    shutil.rmtree(sweep_folder)
    loaded = [loaded_by_its_card(folder)["model"] for folder in elsewhere.glob("alpha-*")]
    parameters = {sum(weight.numel() for weight in model.parameters()) for model in loaded}
    assert parameters == {int(row["parameters"]) for row in results(finished[0])} and len(loaded) == 2


def test_a_model_of_any_shape_is_calibrated_on_two_texts_and_compared_on_two(config, tmp_path):
    settings = ["recovery.method=none", "runtime.ranks=1", "calibration.samples=4", "evaluation.tasks=[]"]
    settings += ["prune.refit=dense", "prune.effort=quick"]
    first, second = ({"path": str(config.parent / name)} for name in ("calibration.jsonl", "heldout.jsonl"))
    settings += ["calibration.path=null", f"calibration.mixture=[{first}, {second}]"]
    settings += ["evaluation.fidelity.path=null", f"evaluation.fidelity.texts={{own: {second}, other: {first}}}"]
    chosen = ["--models", "alpha", "--ratios", "0.3", "--methods", "surgeon-any-shape"]
    result = sweep(config, tmp_path, *chosen, *itertools.chain(*(("--set", setting) for setting in settings)))
    assert result.returncode == 0, result.stderr[-2000:]
    pruned = next(row for row in results(tmp_path) if row["ratio"] == "0.3")
    assert pruned["status"] == "done" and float(pruned["kl"]) > 0
    assert float(pruned["fidelity/other/kl"]) > 0 and "| KL other |" in (tmp_path / "results.md").read_text()
    assert float(pruned["ratio_reached"]) == pytest.approx(0.3, abs=0.002)
    elsewhere = shutil.copytree(tmp_path / pruned["checkpoint"], tmp_path / "elsewhere" / pruned["checkpoint"])
    shutil.rmtree(tmp_path / "store")
    model = loaded_by_its_card(elsewhere)["model"]
    assert sum(weight.numel() for weight in model.parameters()) == int(pruned["parameters"])


def test_a_session_in_python_takes_up_a_sweep(finished, config, monkeypatch):
    """The README's lines run; no stage does."""
    out, _ = finished
    before = {name: (out / name).read_bytes() for name in ("results.csv", "results.md", "results.json")}
    text = (ROOT / "launch" / "README.md").read_text()
    lines = re.search(r"```py\n(.*?)```", text, re.DOTALL)[1]
    lines = (
        lines.replace("runs/notebook", str(out))
        .replace("my.yaml", str(config))
        .replace("ratios=[0.2]", 'models=["alpha"], ratios=[0.2]')
    )
    monkeypatch.setattr(subprocess, "Popen", None)
    shown = {}
    exec(lines, shown)
    assert {name: (out / name).read_bytes() for name in before} == before
    assert [row["label"] for row in shown["rows"]] == [
        row["label"] for row in json.loads(before["results.json"])["rows"]
    ]
    assert [len(layer) for layer in shown["scores"]["alpha"]["surgeon"]] == [48, 48]
    assert set(shown["folders"]) == {("alpha", 0.2, "surgeon-uniform-block")}
    pruned = AutoModelForCausalLM.from_pretrained(shown["folders"]["alpha", 0.2, "surgeon-uniform-block"])
    assert pruned.config.intermediate_size < 48


# Ranks of the first stage do not end by themselves.
SLEEPING = {"PYTHONPATH": str(FAULTS), "SLOW_MATCH": "partial", "SLOW_S": "600"}


def start(config, out, *arguments, environment=None):
    whole = {**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})}
    return Submitted(forked(command(config, out, *arguments)), whole, out)


def at_work(out, stage_id):
    """Check whether ranks have begun or ended a stage; an asterisk stands for any fingerprint."""
    store = out / "store"
    return [*store.glob(f"work/{stage_id}/progress.json"), *store.glob(f"{stage_id}/manifest.json")]


def test_killing_the_launcher_at_any_moment(finished, config, short_of):
    """It is killed before it has planned, and during stages of every kind."""
    out = short_of(SCORES, PRUNE, RECOVER, EVALUATE)
    ids = [id_of(finished[0], stage) for stage in (SCORES, RECOVER, EVALUATE)]
    moments = [lambda: True, *(lambda stage_id=stage_id: at_work(out, stage_id) for stage_id in ids)]
    for moment in moments:
        launcher = start(config, out, *ONE_CELL)
        wait_for(moment, 0.02)
        launcher.kill()
        launcher.end()  # its ranks, too, have gone
    result = sweep(config, out, *ONE_CELL)
    assert result.returncode == 0, result.stdout
    assert_same_as(finished[0], out)
    assert len(results(out)) == 3


def test_cells_that_do_not_need_a_stage_whose_rank_was_killed_are_finished(finished, config, short_of):
    """With the bits that they have without such a stage before them."""
    of_control = id_of(finished[0], "recover alpha dense + lora")
    out = short_of(SCORES, PRUNE, RECOVER, EVALUATE, "recover alpha dense + lora", "evaluate alpha dense + lora")
    result = sweep(config, out, *ONE_CELL, environment=killing(0, 6, "work/importance"))
    assert result.returncode == 1
    assert "failed importance" in result.stdout and "a rank died without a message" in result.stdout
    dense, control, pruned = results(out)
    assert dense["status"] == control["status"] == "done"
    assert pruned["status"] == "failed" and "importance failed (killed)" in pruned["cause"]
    ours, alone = (folder / "store" / of_control / "model.safetensors" for folder in (out, finished[0]))
    assert ours.read_bytes() == alone.read_bytes()


def test_a_rank_that_fails_ends_the_stage_with_its_message(config, tmp_path):
    """Rank 1 must not write the sums of its layer; rank 0 waits for it."""
    refused = {"PYTHONPATH": str(FAULTS), "REFUSE_RANK": "1", "REFUSE_MATCH": "matrices"}
    few = ["--set", "recovery.method=none", "--set", "evaluation.tasks=[]"]
    result = sweep(config, tmp_path / "out", *ONE_CELL, "--ranks", "2", *few, environment=refused)
    assert result.returncode == 2, result.stdout
    assert "Permission denied; check the permissions" in result.stdout and "Traceback" not in result.stdout
    (log,) = (tmp_path / "out" / "logs").glob("importance-*.1.log")
    assert re.search("error: .*Permission denied; check the permissions", log.read_text())
    commands = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in commands if str(tmp_path / "out") in line], "left running"


def test_a_cancelled_launcher_leaves_nothing_half_written(finished, config, short_of):
    """That nothing is left running is tested in local/test_warm.py."""
    out = short_of(SCORES, PRUNE, RECOVER)  # without a checkpoint, so that all of it is needed
    launcher = start(config, out, *ONE_CELL, environment=SLEEPING)
    wait_for(lambda: at_work(out, id_of(finished[0], SCORES)), 0.02)
    shown = sweep(config, out, *ONE_CELL, "--status").stdout
    assert re.search(r"running .*process \d+", shown) and "job" not in shown
    assert "on 1 rank" in sweep(config, out, *ONE_CELL, "--logs", f"{CELL} + lora").stdout, "said at once"
    cancelled = sweep(config, out, *ONE_CELL, "--cancel")
    assert cancelled.returncode == 0 and re.search(r"process \d+ has stopped work on it", cancelled.stdout)
    code, output = launcher.end()
    assert code == 130 and "run the same command again" in output and "Traceback" not in output
    assert not list((out / "store").rglob(".draft*"))


def test_two_sweeps_at_once_share_the_work(finished, config, short_of):
    out = short_of(SCORES, PRUNE)
    sweeps = [start(config, out, *WITHOUT_RECOVERY) for _ in range(2)]
    ends = [each.end() for each in sweeps]
    assert [code for code, _ in ends] == [0, 0], ends
    assert len(list((out / "logs").iterdir())) == 3, "every stage ran once"
    assert_same_as(finished[0], out)
