"""The status that --status derives from files and squeue."""

import json
import time
from dataclasses import asdict, replace

import pytest
from hfprune_launch.slurm.commands import JobInfo
from hfprune_launch.slurm.status import stage_statuses
from made_stages import stage_of

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.store.attempts import Ledger, Run
from hfprune_dist.store.claims import Holder
from hfprune_dist.store.heartbeat import Failure
from hfprune_dist.store.stage import Input

STAGE = stage_of("importance", "a", {}, {"model": Input("digest", "/somewhere")})
MINUTE = 60


@pytest.fixture
def status(tmp_path):
    """Return the status of a stage whose job started, and last gave a sign of life, the given minutes ago."""
    store = Store(tmp_path / "store")
    store.work(STAGE.id).mkdir(parents=True)

    def at(started=None, beat=None, state="RUNNING", earlier=(), name=None):
        attempt = Ledger(store).begin(STAGE, ranks=1, time_minutes=60)
        attempt.record_job("5")
        now = time.time()
        if started is not None:
            for restart, minutes in enumerate((*earlier, started)):
                attempt.record_run(Run("5", restart, "n1", now - minutes * MINUTE))
        if beat is not None:
            record = {"phase": "calibration", "done": 3, "total": 9, "updated": now - beat * MINUTE}
            write_json(store.work(STAGE.id) / "progress.json", record)
        name = name or attempt.intent.job_name
        jobs = {name: JobInfo("5", state, "None", "n1", name)}
        (line,) = stage_statuses(Plan({STAGE.id: STAGE}, (), (STAGE.id,)), store, jobs)
        return line

    return at


def test_a_job_whose_id_was_never_recorded_is_found_by_its_name(tmp_path):
    store = Store(tmp_path / "store")
    attempt = Ledger(store).begin(STAGE, ranks=1, time_minutes=60)
    store.handle(STAGE.id).work.mkdir(parents=True)
    dead = {**asdict(replace(Holder.me(), pid=2**22 + 1)), "token": "x"}
    (store.work(STAGE.id) / "claim.1").write_text(json.dumps(dead))
    name = attempt.intent.job_name
    jobs = {name: JobInfo("5", "PENDING", "Priority", "", name)}
    (line,) = stage_statuses(Plan({STAGE.id: STAGE}, (), (STAGE.id,)), store, jobs)
    assert (line.state, line.detail) == ("queued", "Priority")


@pytest.mark.parametrize(
    ("times", "detail"),
    [
        ({"started": 60, "beat": 7.2}, "stale for 7 min"),
        ({"started": 8.1}, "stale for 8 min"),
        ({"started": 1, "beat": 600}, ""),  # that was an earlier start
        ({"started": 60, "beat": 7.2, "earlier": (-30,)}, "stale for 7 min"),  # on a node whose clock is ahead
        ({"started": 60, "beat": 1}, ""),
        ({}, ""),
    ],
)
def test_a_rank_that_hangs_shows(status, times, detail):
    line = status(**times)
    assert (line.state, line.detail) == ("running", detail)
    waiting = status(**times, state="PENDING")
    assert waiting.state == "queued" and "stale" not in waiting.detail


def test_what_was_submitted_is_not_called_missing_where_slurm_does_not_answer(tmp_path):
    """Nor dead, if a launcher died at it before. What has failed, or was never submitted, is shown as it is."""
    store = Store(tmp_path)
    waits, begun, failed, never = (
        stage_of("importance", name, {"seed": number}, {}) for number, name in enumerate("abcd")
    )
    for number, stage in enumerate((waits, begun, failed)):
        Ledger(store).begin(stage, ranks=1, time_minutes=60).record_job(str(number))
        store.work(stage.id).mkdir(parents=True)
    dead = {**asdict(replace(Holder.me(), pid=2**22 + 1)), "token": "x"}
    (store.work(begun.id) / "claim.1").write_text(json.dumps(dead))
    store.handle(failed.id).report_failure(Failure("input", "a bad text", 0, 0.0, 1))
    plan = Plan({stage.id: stage for stage in (waits, begun, failed, never)}, (), (waits.id, begun.id, never.id))
    assert [line.state for line in stage_statuses(plan, store, None)] == ["submitted", "submitted", "failed", "missing"]
    assert [line.state for line in stage_statuses(plan, store, {})] == ["submitted", "submitted", "failed", "missing"]


def test_a_job_of_another_cluster_is_not_shown(status):
    """Another cluster, or one set up anew, gives the same ids to other jobs."""
    line = status(name="something-else")
    assert (line.state, line.nodes) == ("submitted", "")
