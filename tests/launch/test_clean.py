"""Freeing disk space: what goes, what stays, and what a later sweep does; no stage runs here."""

import errno
import os
import re
import shutil
from pathlib import Path

import pytest
from damage import in_use
from fake_slurm import Job
from hfprune_launch import clean, report, sweep
from made_stages import begun, being_made, stage_of
from sweeps import in_process, planned

from hfprune_dist.store.artifacts import Store

OTHER = stage_of("prune", "alpha 0.15", {"ratio": 0.15})  # of no row
UNKNOWN = OTHER.fingerprint


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """A finished sweep over alpha from which a row with another ratio has been forgotten."""
    out = tmp_path_factory.mktemp("made") / "out"
    chosen = ["--config", config, "--out", out, "--models", "alpha", "--ratios"]
    for ratio in (0.15, 0.2):
        store, plan = Store(out / "store"), planned(config, models=["alpha"], ratios=[ratio])[1]
        for stage in (stage for stage in plan.stages.values() if not store.handle(stage.id).is_committed()):
            record = {"metrics": {"fidelity": {}, "tasks": {}, "ratio_reached": ratio, "parameters": 5}}
            with being_made(store, stage, **record, wall_time_s=1.0, world_size=1, peak_memory_bytes=1) as draft:
                for name in ("config.json", "model.safetensors") if stage.kind in ("prune", "recover") else ("scores",):
                    (draft / name).write_text("{}" + "x" * 998)
        assert in_process(sweep.main, *chosen, ratio)[0] == 0
    assert in_process(sweep.main, "--out", out, "--forget", "alpha 0.15 surgeon-uniform-block + lora")[0] == 0
    return out


@pytest.fixture
def out(made, tmp_path):
    shutil.copytree(made, tmp_path / "out", symlinks=True)
    return tmp_path / "out"


def run(*arguments, command=clean):
    code, shown, said = in_process(command.main, *arguments)
    assert code == 0, said
    return shown


def files(out):
    """Return all files but claims, such as those of locks."""
    found = (file for file in out.rglob("*") if file.is_file() and not file.name.startswith("claim."))
    return {str(file.relative_to(out)): file.read_bytes() for file in found}


def removed(before, out):
    """Map each kind of stage to its files that are gone."""
    found = {}
    for file in sorted(before.keys() - files(out).keys()):
        _, kind, _, name = file.split("/", 3)
        found.setdefault(kind, []).append(name)
    return found


WHOLE = ["config.json", "manifest.json", "model.safetensors"]


def test_what_no_row_refers_to_goes_and_the_same_command_runs_nothing(config, out):
    before = files(out)
    shown = run(out)
    assert removed(before, out) == {"evaluate": ["manifest.json", "scores"], "prune": WHOLE, "recover": WHOLE}
    freed = sum(len(content) for name, content in before.items() if name not in files(out))
    assert f"{freed:,} bytes removed" in shown
    again = run("--config", config, "--out", out, "--models", "alpha", "--ratios", "0.2", command=sweep)
    assert "stages to run" not in again
    assert re.search(r"^ +0 bytes removed", run(out), re.MULTILINE)


def test_a_dry_run_tells_the_same_and_touches_nothing(out):
    before = files(out)
    told = run(out, "--dry-run", "--intermediates")
    assert files(out) == before and not list(out.glob("store/work/*/*/claim*"))
    assert "would be removed" in told
    done = run(out, "--intermediates")
    assert done.splitlines()[:-1] == told.splitlines()[:-1]


def test_intermediate_checkpoints_go_and_tables_stay(config, out):
    run(out)
    run(out, command=report)
    tables = {name: (out / name).read_bytes() for name in ("results.csv", "results.md", "results.json")}
    before = files(out)
    run(out, "--intermediates")
    assert removed(before, out) == {"prune": ["config.json", "model.safetensors"]}
    run(out, command=report)
    assert "not needed" in run("--out", out, "--status", command=sweep)
    assert {name: (out / name).read_bytes() for name in tables} == tables
    chosen = ["--config", config, "--out", out, "--models", "alpha", "--ratios"]
    assert "stages to run" not in run(*chosen, "0.2", command=sweep)
    # A new row still has its scores; deleting a recovered checkpoint means that its pruned one is made again.
    assert to_run(run(*chosen, "0.1", "--dry-run", command=sweep)) == ["prune", "recover", "evaluate"]
    (recovered,) = [file for file in out.glob("store/recover/*/manifest.json") if "alpha 0.2" in file.read_text()]
    shutil.rmtree(recovered.parent)
    plan = run(*chosen, "0.2", "--dry-run", command=sweep)
    assert to_run(plan) == ["prune", "recover"] and "its files were removed to make room" in plan


def to_run(plan):
    return [line.split()[0] for line in plan.splitlines() if re.search(r"\b[0-9a-f]{20}  run", line)]


def test_what_can_not_be_removed_does_not_count_as_removed(out):
    before = files(out / "store")
    with in_use("model.safetensors"):
        code, shown, said = in_process(clean.main, out)
    freed = sum(map(len, before.values())) - sum(map(len, files(out / "store").values()))
    assert code == 2 and f" {freed:,} bytes removed" in shown and "part of it can't be removed" in said
    assert " 2,000 bytes removed" in run(out)


def test_what_can_not_be_renamed_stays_and_the_rest_goes(out, monkeypatch):
    rename = Path.rename

    def refuse(path, target):
        if path.parent.name == "prune":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM), str(path))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", refuse)
    code, shown, said = in_process(clean.main, out)
    assert code == 2 and "prune/" in said and "part of it can't be removed" in said
    assert " 0 bytes removed" not in shown and "bytes removed" in shown


def test_what_has_begun_meanwhile_is_neither_removed_nor_counted(out, monkeypatch):
    before, draft = files(out), out / "store" / "prune" / f".draft-{'0' * 20}-1" / "file"
    remove = shutil.rmtree

    def begin(*arguments, **options):
        draft.parent.mkdir(exist_ok=True)
        draft.write_text("12345")
        return remove(*arguments, **options)

    (out / "store" / "quarantine" / "prune-1").mkdir(parents=True)
    monkeypatch.setattr(clean.shutil, "rmtree", begin)
    shown = run(out)
    freed = sum(len(content) for name, content in before.items() if name not in files(out))
    assert f" {freed:,} bytes removed" in shown and draft.read_text() == "12345"


def test_drafts_progress_and_what_was_set_aside_go(out):
    store = out / "store"
    run(out)
    before = set(store.rglob("*"))
    for name in ("prune/.draft-0-1", f"work/recover/{UNKNOWN}/snapshots", "quarantine/prune-1", "rows"):
        (store / name).mkdir(parents=True)
        (store / name / "file").write_text("12345")
    (store / "prune" / "notes").mkdir()
    (store / "prune" / "notes" / "file").write_text("mine")
    needed = next(iter((store / "prune").glob("[0-9a-f]" * 20))).name
    (store / "work" / "prune" / needed).mkdir(parents=True)
    assert "20 bytes removed" in run(out)
    mine = store / "prune" / "notes" / "file"
    assert {file for file in store.rglob("*") if file.is_file()} == {mine, *(file for file in before if file.is_file())}
    assert (store / "work" / "prune" / needed).is_dir(), "of a row that is there"


def refused(out, before, told=f"{OTHER.id} runs, or may run"):
    for options in ([], ["--dry-run"]):
        code, _, said = in_process(clean.main, out, *options)
        assert code == 2 and told in said
    assert files(out) == before


def test_nothing_goes_while_a_stage_runs(out):
    handle = Store(out / "store").handle(OTHER.id)
    claim, before = handle.claim(), files(out)
    refused(out, before)
    claim.release()
    assert run(out)


def test_nothing_goes_while_a_job_may_wait_even_if_slurm_does_not_answer(out, fake):
    attempt = begun(Store(out / "store"), OTHER, time_minutes=1)
    assert run(out, "--dry-run"), "it was never submitted: Slurm does not list its name"
    attempt.record_job("101")
    before = files(out)
    fake.jobs["101"] = Job(attempt.intent.job_name, "PENDING")
    refused(out, before)
    fake.fail_next("squeue", "error", "error")
    refused(out, before, f"run this where it does or, if they are gone for good, rm -r {attempt.folder}")
    fake.jobs["101"] = Job(attempt.intent.job_name, "CANCELLED")
    assert run(out)
