"""The backend's decisions, with fake commands in place of Slurm."""

import time
from types import SimpleNamespace

import pytest
from fake_slurm import FakeSlurm
from ranks import ROOT
from sweeps import make_inputs, sweep

from hfprune_dist.artifacts import Store
from hfprune_dist.claims import try_claim
from hfprune_dist.config import RuntimeConfig, load_config
from hfprune_dist.methods import resolve_methods
from hfprune_dist.models.sources import resolve_models
from hfprune_dist.plan import Cell, Input, Plan, Stage, build_plan
from launch.cluster import cancel_jobs
from launch.layout import Origin
from launch.ledger import Ledger, Run
from launch.profiles import Profile, Resources
from launch.slurm import SlurmBackend, Submitting
from launch.slurm_cli import SlurmCommands

SCORES = Stage("importance", "a", {}, {"model": Input("digest", "/model")})
PRUNES = [Stage("prune", f"a {r}", {"ratio": r}, {"importance": SCORES.as_input()}) for r in (0.2, 0.3)]
PLAN = Plan({stage.id: stage for stage in (SCORES, *PRUNES)}, ())


@pytest.fixture
def fake(tmp_path, monkeypatch):
    return FakeSlurm(tmp_path / "slurm").on_path(monkeypatch)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def make_backend(store, plan=PLAN, max_running=None):
    told = []
    resources = dict.fromkeys(("importance", "prune", "recover", "evaluate"), Resources())
    submitting = Submitting(
        Origin(RuntimeConfig(), {}, {}), Profile("test", resources, None), store.root / "code", max_running
    )
    backend = SlurmBackend(store, plan, submitting, SlurmCommands(sleep=lambda _: None), told.append)
    return SimpleNamespace(
        start=backend.start, step=backend.step, follow=backend.follow, unsubmitted=backend.unsubmitted, told=told
    )


def complete(store, stage):
    draft = store.open_draft(stage.id)
    (draft / "result").write_text("x")
    store.commit(stage, draft, {"metrics": {}, "wall_time_s": 1.0})


def script_of(store, stage, number=1):
    return (store.root / "attempts" / stage.id / str(number) / "job.sh").read_text()


def causes(store, stage):
    return [attempt.end.cause if attempt.end else None for attempt in Ledger(store.root).attempts(stage.id)]


def test_dependencies_become_slurms(fake, store):
    make_backend(store).start()
    assert list(fake.jobs()) == ["101", "102", "103"]
    assert "--dependency" not in script_of(store, SCORES)
    for stage in PRUNES:
        assert "#SBATCH --dependency=afterok:101\n" in script_of(store, stage)
        assert "#SBATCH --kill-on-invalid-dep=yes" in script_of(store, stage)


def test_what_is_done_or_queued_is_not_submitted_again(fake, store):
    complete(store, SCORES)
    make_backend(store).start()
    make_backend(store).start()
    assert len(fake.calls("sbatch")) == 2
    assert "--dependency" not in script_of(store, PRUNES[0])


def test_only_an_artifact_is_success(fake, store):
    backend = make_backend(store)
    backend.start()
    complete(store, SCORES)
    fake.set_state("101", "FAILED")
    fake.set_state("102", "COMPLETED")
    backend.step()
    assert causes(store, SCORES) == ["done"]
    for _ in range(9):  # an artifact may be visible here only some time after its job has ended
        backend.step()
    assert causes(store, PRUNES[0])[0] == "killed"


def test_retries_are_bounded(fake, store):
    backend = make_backend(store, Plan({SCORES.id: SCORES}, ()))
    backend.start()
    for _ in range(10):
        for job_id in fake.jobs():
            fake.set_state(job_id, "FAILED")
        backend.step()
    assert causes(store, SCORES) == ["killed"] * 3
    make_backend(store, Plan({SCORES.id: SCORES}, ())).start()
    assert len(causes(store, SCORES)) == 4, "the same command tries again"


def test_a_cancelled_job_waits_for_the_user(fake, store):
    backend = make_backend(store)
    backend.start()
    ledger = Ledger(store.root)
    ledger.last(SCORES.id).record_run(Run("101", 0, "n1", time.time()))
    for job_id in ("101", "102", "103"):
        fake.set_state(job_id, "CANCELLED")
    backend.follow(lambda: None, sleep=lambda _: None)
    assert causes(store, SCORES) == ["cancelled"] and causes(store, PRUNES[0]) == ["dependency"]
    assert len(fake.calls("sbatch")) == 3
    make_backend(store).start()
    assert len(fake.calls("sbatch")) == 6


def test_dependents_follow_a_retry(fake, store):
    backend = make_backend(store)
    backend.start()
    fake.set_state("101", "NODE_FAIL", "n3")
    fake.set_state("102", "CANCELLED")
    fake.set_state("103", "CANCELLED")
    Ledger(store.root).last(SCORES.id).record_run(Run("101", 0, "n3", time.time()))
    backend.step()
    assert "#SBATCH --exclude=n3" in script_of(store, SCORES, 2)
    assert "--dependency=afterok:104\n" in script_of(store, PRUNES[0], 2)


def test_a_job_whose_id_was_never_written_is_adopted(fake, store):
    make_backend(store).start()
    for job in (store.root / "attempts").glob("*/*/1/job.json"):
        job.unlink()
    backend = make_backend(store)
    backend.start()
    assert len(fake.calls("sbatch")) == 3
    assert {event.what for event in backend.told} == {"adopted"}
    assert Ledger(store.root).last(SCORES.id).job_id == "101"


def test_an_intent_that_came_to_nothing_is_submitted_again(fake, store):
    Ledger(store.root).open_attempt(SCORES, 0, 1, 60, None)
    make_backend(store).start()
    assert causes(store, SCORES) == ["lost job", None]


def test_a_launcher_that_is_submitting_is_left_alone(fake, store):
    Ledger(store.root).open_attempt(SCORES, 0, 1, 60, None)
    claim = try_claim(store.work(SCORES.id))
    make_backend(store).start()
    assert causes(store, SCORES) == [None] and fake.calls("sbatch") == []
    claim.release()


def test_a_job_that_noted_its_own_start_needs_no_squeue(fake, store):
    attempt = Ledger(store.root).open_attempt(SCORES, 0, 1, 60, None)
    attempt.record_run(Run("55", 0, "n1", time.time()))
    complete(store, SCORES)
    make_backend(store).start()
    backend = make_backend(store)
    backend.start()
    assert fake.calls("sbatch") and "importance" not in " ".join(fake.calls("sbatch"))


def test_a_new_cluster_may_give_an_id_again(fake, store):
    attempt = Ledger(store.root).open_attempt(SCORES, 0, 1, 60, None)
    attempt.record_job("7")
    (fake.folder / "jobs").write_text("7|RUNNING|None|n1|N/A|N/A|somebody-else\n")
    make_backend(store).start()
    assert causes(store, SCORES) == ["killed", None]


def test_never_more_lanes_than_max_running(fake, store):
    complete(store, SCORES)
    plan = Plan(
        {s.id: s for s in [SCORES, *(Stage("prune", str(n), {"n": n}, {"i": SCORES.as_input()}) for n in range(5))]}, ()
    )
    make_backend(store, plan, max_running=2).start()
    waits = [script_of(store, stage) for stage in plan.stages.values() if stage is not SCORES]
    found = [[line for line in script.splitlines() if "dependency" in line] for script in waits]
    assert found == [[], [], *([f"#SBATCH --dependency=afterany:{job}"] for job in (101, 102, 103))]


def test_a_full_queue_is_filled_up_later(fake, store):
    fake.fail_next("sbatch", "sbatch: error: AssocMaxSubmitJobLimit")
    backend = make_backend(store)
    backend.start()
    assert causes(store, SCORES) == ["submit limit"]
    assert backend.unsubmitted() == list(PLAN.stages.values())
    backend.step()
    assert causes(store, SCORES) == [None], "the same attempt"
    assert len(fake.jobs()) == 3 and backend.unsubmitted() == []


def test_a_refused_job_keeps_back_only_what_needs_it(fake, store):
    complete(store, SCORES)
    fake.fail_next("sbatch", "sbatch: error: Invalid account")
    backend = make_backend(store)
    backend.start()
    assert causes(store, PRUNES[0]) == ["refused"] and causes(store, PRUNES[1]) == [None]


def test_cancel_ends_the_sweeps_jobs_only(fake, store):
    make_backend(store).start()
    with (fake.folder / "jobs").open("a") as stream:
        stream.write("999|RUNNING|None|n1|N/A|N/A|mine\n")
    assert cancel_jobs(PLAN, store, SlurmCommands()) == ["101", "102", "103"]
    assert fake.calls("scancel") == ["scancel 101 102 103"]


def test_a_thousand_cells(fake, store, tmp_path, monkeypatch):
    """Polled with one squeue call per round."""
    ratios = [round(0.05 + number * 0.0001, 4) for number in range(1000)]
    config_file = make_inputs(tmp_path)
    config = load_config(
        [config_file], {"models": ["alpha"], "ratios": ratios, "recovery.method": "none", "evaluation.tasks": []}
    )
    models = resolve_models(config, tmp_path / "none", store.hashes, download=False)
    plan = build_plan(config, models, resolve_methods(config, ROOT / "configs" / "methods"), store.hashes)
    assert all(store.verify(stage_id).state == "missing" for stage_id in plan.stages)
    assert len(plan.cells) == 1001 and isinstance(plan.cells[0], Cell)
    monkeypatch.setattr("os.fsync", lambda _: None)  # 4,000 of them are slow on a busy disk
    ledger, lines = Ledger(store.root), []
    for number, stage in enumerate(plan.stages.values(), 1000):
        attempt = ledger.open_attempt(stage, 0, 1, 60, None)
        attempt.record_job(str(number))
        lines.append(f"{number}|PENDING|Priority||N/A|N/A|{attempt.intent.job_name}\n")
    (fake.folder / "jobs").write_text("".join(lines))
    backend = make_backend(store, plan)
    backend.start()
    assert len(fake.calls()) == 1
    for _ in range(3):
        backend.step()
    assert fake.calls() == fake.calls("squeue") and len(fake.calls()) == 4


def test_dry_run_prints_what_would_be_submitted_where_there_is_no_slurm(tmp_path):
    config = make_inputs(tmp_path)
    result = sweep(
        config,
        tmp_path / "out",
        "--profile",
        "example-gpu",
        "--dry-run",
        "--set",
        "recovery.batch_size=32",
        environment={"PATH": "/usr/bin-without-slurm"},
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "out").exists()
    assert result.stdout.count("#!/bin/bash") == 22 and "#SBATCH --gpus-per-node=8" in result.stdout
    assert "srun --unbuffered" in result.stdout and "--kill-on-bad-exit=1" in result.stdout
    assert "#SBATCH --dependency='afterok:<job of importance/" in result.stdout
    importance, reference, prune = 2 * 16 * 4, 2 * 8 * 4, 4 * 8 * 4  # stages * GPUs * hours
    recover, evaluate = 6 * 32 * 12, 8 * 8 * 2
    assert importance + reference + prune + recover + evaluate == 2752
    assert "at most 2,752.0 GPU-hours" in result.stdout


def test_no_slurm_is_one_clear_message(tmp_path):
    config = make_inputs(tmp_path)
    result = sweep(
        config, tmp_path / "out", "--profile", "local-cluster", environment={"PATH": "/usr/bin-without-slurm"}
    )
    assert result.returncode == 2 and "no sbatch on this machine" in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()
