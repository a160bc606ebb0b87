import errno
import os
from pathlib import Path

import pytest
from damage import in_use
from made_stages import being_made, stage_of

from hfprune_dist.store.artifacts import MANIFEST, StageHandle
from hfprune_dist.store.claims import Claim, Holder
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a label", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})


def make(store, content="weights"):
    with being_made(store, STAGE, metrics={"parameters": 3}) as draft:
        (draft / "model.bin").write_text(content)
        (draft / "sub").mkdir()
        (draft / "sub" / "more.txt").write_text("more")


def test_a_committed_artifact_verifies_and_carries_its_manifest(store):
    assert store.handle(STAGE.id).verify().state == "missing"
    make(store)
    assert store.handle(STAGE.id).verify().state == store.handle(STAGE.id).verify(thorough=True).state == "done"
    manifest = store.handle(STAGE.id).manifest()
    assert manifest["stage"]["fingerprint"] == STAGE.fingerprint
    assert set(manifest["files"]) == {"model.bin", "sub/more.txt"}
    assert not list((store.root / "prune").glob(".draft*"))


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped", "manifest", "no manifest"])
def test_damage_is_found_and_set_aside(store, damage):
    make(store)
    file = store.handle(STAGE.id).artifact / ("manifest.json" if "manifest" in damage else "model.bin")
    if damage in ("missing", "no manifest"):
        file.unlink()
    elif damage == "manifest":
        file.write_text(file.read_text()[:50])
    else:
        file.write_text("weight" if damage == "truncated" else "Weights")
    assert store.handle(STAGE.id).verify().state == "corrupt"
    with store.handle(STAGE.id).claimed_briefly() as claim:
        aside = store.handle(STAGE.id).set_aside(claim)
    assert aside.is_dir() and store.handle(STAGE.id).verify().state == "missing"
    make(store)
    assert store.handle(STAGE.id).verify().state == "done"


@pytest.mark.parametrize("seen", [[], [False]], ids=["", "not valid at first"])
def test_the_loser_of_a_race_keeps_the_winners_artifact(store, monkeypatch, seen):
    make(store, "winner")
    is_done = StageHandle.is_done
    monkeypatch.setattr(StageHandle, "is_done", lambda handle: seen.pop() if seen else is_done(handle))
    make(store, "loser")
    assert (store.handle(STAGE.id).artifact / "model.bin").read_text() == "winner"
    assert [path.name for path in (store.root / STAGE.kind).iterdir()] == [STAGE.fingerprint]


def test_without_its_committed_time_a_file_is_read(store):
    """As in a copied store. Damage behind an unchanged time is found by reading every file."""
    make(store)
    file = store.handle(STAGE.id).artifact / "model.bin"
    committed = file.stat().st_mtime_ns
    os.utime(file, (1, 1))
    assert store.handle(STAGE.id).verify().state == "done"
    file.write_text("Weights")
    os.utime(file, ns=(committed, committed))
    assert store.handle(STAGE.id).verify(thorough=True).state == "corrupt"


@pytest.mark.parametrize("reader", ["read_text", "stat"])
def test_what_can_not_be_read_now_is_not_set_aside(store, monkeypatch, reader):
    """A server that doesn't answer, or a lack of permission, says nothing about an artifact."""
    make(store)
    original, hidden = getattr(Path, reader), (MANIFEST, "model.bin")

    def refuse(path, **how):
        if path.name in hidden:
            raise OSError(errno.EIO, "Input/output error", str(path))
        return original(path, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Path, reader, refuse)
        with pytest.raises(OSError, match="Input/output"):
            store.handle(STAGE.id).set_aside(Claim(store.handle(STAGE.id).work, "token"))
    assert store.handle(STAGE.id).verify().state == "done"


def test_what_is_emptied_may_be_in_use(store):
    make(store)
    with in_use("model.bin"):
        store.handle(STAGE.id).empty()
    assert {path.name for path in store.handle(STAGE.id).artifact.iterdir()} == {MANIFEST, "model.bin"}
    make(store)
    assert store.handle(STAGE.id).verify().state == "done"


# What is left of a stage's work, before it runs and until its artifact is committed.


@pytest.fixture
def handle(store):
    """A stage whose work folder has progress."""
    handle = store.handle(STAGE.id)
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
