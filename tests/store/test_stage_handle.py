"""What is left of a stage's work, before it runs and until its artifact is committed."""

import pytest
from made_stages import being_made, stage_of

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.claims import Claim, Holder
from hfprune_dist.store.heartbeat import Failure, Progress

STAGE = stage_of("prune", "a label", {"ratio": 0.2}, {})


@pytest.fixture
def handle(tmp_path):
    """A stage whose work folder has progress."""
    handle = Store(tmp_path).handle(STAGE.id)
    handle.work.mkdir(parents=True)
    (handle.work / "refit").write_text("large")
    return handle


def test_work_of_a_stage_that_is_done_is_forgotten(handle):
    with being_made(handle.store, STAGE) as draft:
        (draft / "result").touch()
    for _ in range(2):
        handle.discard_leftovers()
        assert not handle.work.exists(), "nothing is made to be forgotten"


def test_work_of_a_stage_that_is_not_done_or_claimed_stays(handle):
    handle.discard_leftovers()
    assert (handle.work / "refit").is_file()
    claim = handle.claim()
    assert isinstance(claim, Claim) and isinstance(handle.claim(), Holder)
    handle.commit(STAGE, handle.open_draft(claim), {"metrics": {}}, claim)
    handle.discard_leftovers()
    assert (handle.work / "refit").is_file()


def test_progress_is_discarded_without_what_launchers_leave(handle):
    claim = handle.claim()
    Progress(handle.work).update("layers", 1, 9)
    handle.report_failure(Failure("killed", "", -1, 0.0, 1))
    handle.discard_progress()
    assert not (handle.work / "refit").exists() and claim.is_held()
    assert handle.heartbeat().done == 1 and handle.failure().cause == "killed"
