"""Past attempts as a report shows them, from the records of jobs."""

import time
from dataclasses import asdict

import pytest
from hfprune_launch.modes.past_attempts import past_attempts as all_attempts
from hfprune_launch.slurm.attempt_records import End, Run
from hfprune_launch.slurm.attempts import Attempts
from hfprune_launch.slurm.exit_causes import explain_end
from hfprune_launch.slurm.job_info import JobInfo
from hfprune_launch.slurm.past_attempts import past_attempts
from hfprune_launch.slurm.slurm_stage import SlurmStage
from made_stages import stage_of

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.store.heartbeat import Heartbeat
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})


def told(tmp_path):
    found = past_attempts(SlurmStage(Store(tmp_path), STAGE.id))
    return [(it.number, it.state, it.started, it.ended, it.cause, it.where) for it in found]


def test_every_start_of_every_job_has_its_end(tmp_path):
    assert told(tmp_path) == []
    attempt = Attempts(tmp_path).begin(STAGE, 8, 64, 30, None)
    assert told(tmp_path) == [(1, "open", None, None, "no end known", "job unknown")]
    attempt.record_run(Run("7", 0, "n1", 100.0))
    attempt.record_run(Run("7", 1, "n2", 200.0))
    requeued = (1, "failed", 100.0, None, "died", "job 7 on n1")
    assert told(tmp_path) == [requeued, (1, "open", 200.0, None, "no end known", "job 7 on n2")]
    attempt.close(End("bad node", "n2 is down", 250.0))
    second = Attempts(tmp_path).begin(STAGE, 8, 64, 30, None)
    second.record_run(Run("8", 0, "n3", 300.0, 400.0, "done"))
    second.close(End("done", "", 401.0))
    assert told(tmp_path) == [
        requeued,
        (1, "failed", 200.0, 250.0, "bad node", "job 7 on n2"),
        (2, "done", 300.0, 400.0, "done", "job 8 on n3"),
    ]


def test_a_start_that_was_killed_ended_when_slurm_or_its_heartbeat_says(tmp_path):
    """The next launcher may notice only days later."""
    store, started = Store(tmp_path), time.time() - 86_400
    store.work(STAGE.id).mkdir(parents=True)
    attempt = Attempts(tmp_path).begin(STAGE, 8, 64, 30, None)
    attempt.record_job("7")
    attempt.record_run(Run("7", 0, "n1", started))
    ended = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(started + 600))
    job = JobInfo("7", "NODE_FAIL", "None", "n1", "N/A", ended, attempt.intent.job_name)
    attempt.close(explain_end(store, STAGE, attempt, job))
    (start,) = past_attempts(SlurmStage(store, STAGE.id))
    assert start.ended - start.started == pytest.approx(600, abs=1)
    write_json(store.work(STAGE.id) / "progress.json", asdict(Heartbeat("layers", 1, 2, started + 300)))
    attempt.close(explain_end(store, STAGE, attempt, None))
    (start,) = past_attempts(SlurmStage(store, STAGE.id))
    assert start.ended - start.started == pytest.approx(300)
    attempt.record_run(Run("7", 1, "n1", started + 400))
    (_, last) = past_attempts(SlurmStage(store, STAGE.id))
    assert last.started == last.ended, "it ended before its first heartbeat"


def test_starts_on_nodes_with_wrong_clocks(tmp_path):
    """What the last start says is not taken for what an earlier one said, and nothing lasts a negative time."""
    attempt = Attempts(tmp_path).begin(STAGE, 8, 64, 30, None)
    attempt.record_run(Run("7", 0, "n1", 900.0, 1000.0, "interrupted"))
    attempt.record_run(Run("7", 1, "n2", 400.0))
    attempt.close(End("bad node", "n2 is down", 390.0))
    assert told(tmp_path) == [
        (1, "failed", 900.0, 1000.0, "interrupted", "job 7 on n1"),
        (1, "failed", 400.0, 400.0, "bad node", "job 7 on n2"),
    ]
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / f"{STAGE.kind}-{STAGE.fingerprint}.1.log").write_text("1970-01-01 00:07:30+0000 prune\n")
    (tmp_path / "store").symlink_to(".")
    assert [it.started for it in all_attempts(tmp_path)(STAGE)] == [450.0, 900.0, 400.0]


def test_the_node_at_fault_is_that_of_the_last_start(tmp_path):
    attempt = Attempts(tmp_path).begin(STAGE, 8, 64, 30, None)
    attempt.record_run(Run("7", 0, "n1", 900.0, 1000.0, "interrupted"))
    attempt.record_run(Run("7", 1, "n2", 400.0))
    job = JobInfo("7", "NODE_FAIL", "None", "n2", "N/A", "Unknown", attempt.intent.job_name)
    assert explain_end(Store(tmp_path), STAGE, attempt, job).bad_nodes == ["n2"]
