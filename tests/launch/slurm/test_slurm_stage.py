"""A stage's handle on a cluster: its attempts, and what the jobs of ended attempts hold."""

import pytest
from hfprune_launch.slurm.attempt_records import End
from hfprune_launch.slurm.attempts import Attempts
from hfprune_launch.slurm.slurm_stage import SlurmStage
from made_stages import stage_of

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.claims import Claim, Holder, try_claim

STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {})


@pytest.fixture
def handle(tmp_path):
    return SlurmStage(Store(tmp_path), STAGE.id)


def submitted(handle, job_id):
    attempt = Attempts(handle.store.root).begin(STAGE, 0, 1, 60, None)
    attempt.record_job(job_id)
    return attempt


def test_attempts_are_those_of_the_stage(handle):
    assert handle.attempts() == [] and handle.last_attempt() is handle.open_attempt() is None
    first = submitted(handle, "1")
    assert handle.open_attempt().job_id == "1"
    first.close(End("killed", "", 0.0))
    assert handle.open_attempt() is None and handle.last_attempt().job_id == "1"
    submitted(handle, "2")
    assert [attempt.job_id for attempt in handle.attempts()] == ["1", "2"]
    assert handle.open_attempt().job_id == handle.last_attempt().job_id == "2"
    Attempts(handle.store.root).begin(stage_of("prune", "b", {"ratio": 0.3}, {}), 0, 1, 60, None)
    assert len(handle.attempts()) == 2


def test_a_job_that_is_over_holds_nothing(handle):
    attempt = submitted(handle, "7")
    assert isinstance(try_claim(handle.work, job="7"), Claim)
    assert isinstance(handle.claim(), Holder), "its job may be running"
    attempt.close(End("killed", "", 0.0))
    assert isinstance(handle.claim(), Holder), "nobody has said that the job is over"
    attempt.close(End("bad node", "", 0.0, state="NODE_FAIL"))
    assert isinstance(handle.claim(), Claim)


@pytest.mark.parametrize("job", ["7", "8"])
def test_a_requeued_job_succeeds_itself(handle, job):
    try_claim(handle.work, job="7")
    assert isinstance(handle.claim(job), Claim if job == "7" else Holder)
