"""Cancelling what runs on a machine; a process stands in for the launcher."""

import os
import signal
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
from hfprune_launch.local import cancel
from hfprune_launch.local.cancel import cancel_running, running_without_job, wait_for_running
from made_stages import stage_of

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import read_json, write_json
from hfprune_dist.store.claims import Holder
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})
PLAN = Plan({STAGE.id: STAGE}, (), (STAGE.id,))
HOLDS = """
import signal, sys, time
from pathlib import Path
from hfprune_dist.store.claims import try_claim
claim = try_claim(Path(sys.argv[1]))
try:
    print("held", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    if sys.argv[2] == "listens":
        claim.release()  # and lives on, as the kernel of a notebook does
    print("interrupted", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.fixture
def launcher(store):
    """Return a function that starts a process which claims the stage."""
    started = []

    def start(manner, before=None):
        command = [sys.executable, "-c", HOLDS, str(store.work(STAGE.id)), manner]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=before))
        assert started[0].stdout.readline() == "held\n"
        return started[0]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def cancelled(store):
    return list(cancel_running(PLAN, store, running_without_job(PLAN, store)))


def test_nothing_runs(store, monkeypatch):
    monkeypatch.setattr(cancel, "BETWEEN_STAGES_S", 0.05)
    assert cancelled(store) == wait_for_running(PLAN, store) == []


def test_what_a_launcher_begins_next_is_waited_for(store, monkeypatch):
    claims = []
    monkeypatch.setattr(cancel, "sleep", lambda _: claims.append(store.handle(STAGE.id).claim()))
    (running,) = wait_for_running(PLAN, store)
    assert running.stage == STAGE and running.holder == Holder.me() and len(claims) == 1


def test_a_finished_sweep_is_not_waited_for(store, monkeypatch):
    draft = store.open_draft(STAGE.id)
    (draft / "model.bin").write_text("weights")
    store.commit(STAGE, draft, {"metrics": {}})
    monkeypatch.setattr(cancel, "sleep", None)
    assert wait_for_running(PLAN, store) == []


def test_a_launcher_is_interrupted_and_waited_for(store, launcher):
    process = launcher("listens")
    assert cancelled(store) == [
        f"cancelled: prune a 0.2: process {process.pid} has stopped work on it; what was saved stays, and the same "
        "command continues"
    ]
    assert process.stdout.readline() == "interrupted\n" and running_without_job(PLAN, store) == []


def test_a_launcher_that_a_script_has_started_in_the_background_is_ended(store, launcher):
    """A shell without job control makes its background processes ignore Ctrl-C's signal."""
    process = launcher("listens", before=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    (line,) = cancelled(store)
    assert line.startswith("cancelled: ") and process.wait() == -signal.SIGTERM


def test_a_launcher_that_takes_the_stage_over_is_interrupted_too(store, launcher):
    first = launcher("listens")
    lines = cancel_running(PLAN, store, running_without_job(PLAN, store))
    told = [next(lines)]
    second = subprocess.Popen([sys.executable, "-c", HOLDS, str(store.work(STAGE.id)), "listens"], stdout=-1, text=True)
    try:
        assert second.stdout.readline() == "held\n"
        told += lines
    finally:
        second.kill()
        second.communicate()
    assert [f"process {it.pid} has stopped" in line for it, line in zip((first, second), told, strict=True)] == [
        True
    ] * 2


def test_a_launcher_that_does_not_listen_is_named(store, launcher, monkeypatch):
    monkeypatch.setattr(cancel, "WAIT_S", 0.2)
    process = launcher("does not")
    (line,) = cancelled(store)
    assert line.startswith("not cancelled yet: prune a 0.2: process") and f"kill {process.pid} ends it" in line


def test_no_process_is_interrupted_that_only_has_the_number_of_one_elsewhere(store, monkeypatch):
    monkeypatch.setattr(os, "kill", None)
    store.work(STAGE.id).mkdir(parents=True)
    write_json(store.work(STAGE.id) / "claim.1", asdict(replace(Holder.me(), host="elsewhere")))
    (line,) = cancelled(store)
    assert line.startswith("not cancelled: ") and f"process {os.getpid()} on elsewhere runs elsewhere" in line


def test_somebody_elses_process_is_left_to_them(store, monkeypatch):
    def refuse(pid, number):
        assert (pid, number) == (os.getpid(), signal.SIGINT)
        raise PermissionError

    claim = store.handle(STAGE.id).claim()
    monkeypatch.setattr(os, "kill", refuse)
    (line,) = cancelled(store)
    assert "is another user's" in line and claim.is_held()


def test_what_a_job_runs_is_not_this_modules(store):
    store.handle(STAGE.id).claim("5")
    assert read_json(store.work(STAGE.id) / "claim.1")["job"] == "5" and cancelled(store) == []
