from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.claims import try_claim
from hfprune_dist.store.stage import Stage

STAGE = Stage("prune", "a label", {"ratio": 0.2}, {})


def with_work(folder):
    store = Store(folder)
    store.work(STAGE.id).mkdir(parents=True)
    (store.work(STAGE.id) / "refit").write_text("large")
    return store


def commit(store):
    draft = store.open_draft(STAGE.id)
    (draft / "result").write_text("x")
    store.commit(STAGE, draft, {"metrics": {}})


def test_work_of_a_stage_that_is_done_is_forgotten(tmp_path):
    store = with_work(tmp_path)
    commit(store)
    store.handle(STAGE.id).discard_leftovers()
    assert not store.work(STAGE.id).exists()
    store.handle(STAGE.id).discard_leftovers()
    assert not store.work(STAGE.id).exists(), "nothing is made to be forgotten"


def test_work_of_a_stage_that_is_not_done_or_claimed_stays(tmp_path):
    store = with_work(tmp_path)
    store.handle(STAGE.id).discard_leftovers()
    assert (store.work(STAGE.id) / "refit").is_file()
    claim = try_claim(store.work(STAGE.id))
    commit(store)
    store.handle(STAGE.id).discard_leftovers()
    assert (store.work(STAGE.id) / "refit").is_file()
    claim.release()
