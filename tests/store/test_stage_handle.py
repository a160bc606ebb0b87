"""The answers of a stage's handle, from before the stage runs until its artifact is committed."""

import pytest
from made_stages import stage_of

from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.claims import Claim, Holder
from hfprune_dist.store.heartbeat import Failure, Progress

STAGE = stage_of("prune", "a label", {"ratio": 0.2}, {})


@pytest.fixture
def handle(tmp_path):
    return Store(tmp_path).handle(STAGE.id)


def with_work(handle):
    handle.work.mkdir(parents=True)
    (handle.work / "refit").write_text("large")
    return handle


def commit(handle):
    draft = handle.open_draft()
    (draft / "result").write_text("x")
    handle.store.commit(STAGE, draft, {"metrics": {}})


def test_a_stage_that_runs_tells_how_far_it_is_and_why_it_failed(handle):
    claim = handle.claim()
    assert isinstance(claim, Claim) and isinstance(handle.claim(), Holder)
    assert handle.claim_of(claim.ticket).is_held()
    Progress(handle.work).update("layers", 3, 9)
    assert (handle.heartbeat().phase, handle.heartbeat().done) == ("layers", 3)
    handle.report_error(ValueError("of ours"), 0, 1)
    handle.report_error(UserError("a user's"), 1, 1)
    handle.report_failure(Failure("killed", "a launcher's", -1, 0.0, 1))
    assert sorted(failure.rank for failure in handle.failures()) == [-1, 0, 1]
    assert handle.failure() == handle.failures()[0] and handle.failure().message == "a user's"
    handle.clear_failures()
    assert handle.failure() is None and handle.heartbeat() is None
    claim.release()
    assert isinstance(handle.claim(), Claim)


def test_a_corrupt_artifact_is_committed_but_not_done(handle):
    commit(handle)
    assert handle.is_committed() and handle.is_done()
    (handle.artifact / "result").write_text("cut")
    assert handle.is_committed() and not handle.is_done() and handle.verify().state == "corrupt"
    aside = handle.set_aside()
    assert (aside / "result").read_text() == "cut" and not handle.is_committed()


def test_work_of_a_stage_that_is_done_is_forgotten(handle):
    commit(with_work(handle))
    handle.discard_leftovers()
    assert not handle.work.exists()
    handle.discard_leftovers()
    assert not handle.work.exists(), "nothing is made to be forgotten"


def test_work_of_a_stage_that_is_not_done_or_claimed_stays(handle):
    with_work(handle).discard_leftovers()
    assert (handle.work / "refit").is_file()
    claim = handle.claim()
    commit(handle)
    handle.discard_leftovers()
    assert (handle.work / "refit").is_file()
    claim.release()


def test_progress_is_discarded_without_what_launchers_leave(handle):
    claim = with_work(handle).claim()
    Progress(handle.work).update("layers", 1, 9)
    handle.discard_progress()
    assert not (handle.work / "refit").exists() and claim.is_held() and handle.heartbeat().done == 1
