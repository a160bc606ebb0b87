"""Death at every point of a commit: what is there afterwards is complete, or is not there."""

import itertools

import pytest
from faults.kill import die_in_fork
from made_stages import being_made, stage_of

from hfprune_dist.store.artifacts import StageHandle, Store
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a label", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})


def commit(store):
    with being_made(store, STAGE) as draft:
        for name in ("a.bin", "b.bin"):
            (draft / name).write_text(name * 100)
    store.handle(STAGE.id).discard_work()


def test_at_every_point_of_a_commit(tmp_path):
    states = []
    for kill_at in itertools.count(1):
        store = Store(tmp_path / str(kill_at))
        store.handle(STAGE.id).work.mkdir(parents=True)
        died = die_in_fork(lambda store=store: commit(store), kill_at, store.root)
        states.append(store.handle(STAGE.id).verify().state)
        assert states[-1] in ("missing", "done"), f"operation {kill_at} left a corrupt artifact"
        if states[-1] == "missing":
            commit(store)
        assert store.handle(STAGE.id).verify(thorough=True).state == "done"
        assert [path.name for path in (store.root / "prune").iterdir()] == [STAGE.fingerprint]
        if not died:
            break
    # It was missing up to the rename and done from then on, with points of death on both sides.
    assert states.index("done") > 5 and "missing" not in states[states.index("done") :]
    assert len(states) > states.index("done") + 1


@pytest.mark.parametrize("remove", [StageHandle.discard, StageHandle.empty])
def test_at_every_point_of_a_removal(tmp_path, remove):
    """The remains can't be taken for an artifact, and the next removal or commit copes with them."""
    states = []
    for kill_at in itertools.count(1):
        store = Store(tmp_path / str(kill_at))
        commit(store)
        died = die_in_fork(lambda store=store: remove(store.handle(STAGE.id)), kill_at, store.root)
        states.append(store.handle(STAGE.id).verify().state)
        if kill_at % 2:
            remove(store.handle(STAGE.id))
            found = {path.name for path in store.handle(STAGE.id).artifact.glob("*")}
            assert found == (set() if remove == StageHandle.discard else {"manifest.json"})
        if states[-1] != "done":
            commit(store)
            assert store.handle(STAGE.id).verify(thorough=True).state == "done"
            assert not list(store.root.glob("quarantine/*")), "nothing was damaged"
        if not died:
            break
    assert states[0] == "done" and states[-1] == "missing" and len(states) > 2
