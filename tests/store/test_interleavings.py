"""Several processes whose next file-system operations happen in any order."""

import contextlib
import json
import shutil
from dataclasses import asdict, replace

import pytest
from faults.interleave import interleave
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stages import being_made, stage_of, taken_over

from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.claims import Claim, ClaimLostError, Holder, try_claim
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a label", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})
ORDERS = st.lists(st.integers(0, 5), max_size=120)
often = settings(max_examples=60)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("orders")


def fresh(scratch):
    shutil.rmtree(scratch / "store", ignore_errors=True)
    return Store(scratch / "store")


def corrupt(store):
    with being_made(store, STAGE) as draft:
        (draft / "model.bin").write_text("weights")
    (store.handle(STAGE.id).artifact / "model.bin").write_text("Weights")


def find_and_mend(scratch, makes):
    """Do what a sweep does that finds damage: set it aside, and make what is missing."""
    handle = Store(scratch / "store").handle(STAGE.id)
    with handle.claimed_briefly() as claim:
        aside = handle.set_aside(claim) if claim is not None else None
        if claim is not None and makes and handle.verify().state == "missing":
            draft = handle.open_draft(claim)
            (draft / "model.bin").write_text("weights")
            handle.commit(STAGE, draft, {"metrics": {}}, claim)
        return aside


@often
@given(order=ORDERS, makers=st.lists(st.booleans(), min_size=2, max_size=3))
def test_damage_is_set_aside_once_and_what_was_made_anew_stays(scratch, order, makers):
    store = fresh(scratch)
    corrupt(store)
    aside = interleave([lambda makes=makes: find_and_mend(scratch, makes) for makes in makers], order)
    (folder,) = [path for path in aside if path is not None]
    assert (folder / "model.bin").read_text() == "Weights"
    assert [path.name for path in (store.root / "quarantine").iterdir()] == [folder.name]
    state = store.handle(STAGE.id).verify(thorough=True).state
    assert state in ("done", "missing"), "no damage is left, and nothing that was made anew is damaged"
    assert state == "done" or not all(makers)
    assert {path.name for path in (store.root / STAGE.kind).iterdir()} <= {STAGE.fingerprint}


@often
@given(order=ORDERS, count=st.integers(2, 3), left=st.sampled_from(["nothing", "dead", "released", "garbled"]))
def test_of_those_who_claim_one_wins(scratch, order, count, left):
    store = fresh(scratch)
    folder = store.handle(STAGE.id).work
    folder.mkdir(parents=True)
    record = {**asdict(replace(Holder.me(), pid=2**22 + 1)), "released": left == "released"}
    if left != "nothing":
        (folder / "claim.4").write_text("{" if left == "garbled" else json.dumps(record))
    found = interleave([lambda: try_claim(folder) for _ in range(count)], order)
    winners = [claim for claim in found if isinstance(claim, Claim)]
    assert len(winners) == 1 and winners[0].is_held()
    assert all(holder == Holder.me() for holder in found if isinstance(holder, Holder))
    assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []


def commit_unless_lost(scratch, claim, content):
    """Make an attempt at the stage, up to its end or until it notices that it has lost its claim."""
    store = Store(scratch / "store")
    try:
        draft = store.handle(STAGE.id).open_draft(claim)
        with contextlib.suppress(FileNotFoundError):  # its successor has cleared its draft away
            (draft / "model.bin").write_text(content)
        store.handle(STAGE.id).commit(STAGE, draft, {"metrics": {}}, claim=claim)
    except ClaimLostError:
        store.handle(STAGE.id).discard_draft(claim)
        return "lost"
    return "done"


@often
@given(order=ORDERS)
def test_who_was_taken_for_dead_never_harms_its_successor(scratch, order):
    store = fresh(scratch)
    first = store.handle(STAGE.id).claim()

    def succeed():
        return commit_unless_lost(scratch, taken_over(store, STAGE), "second")

    ends = interleave([lambda: commit_unless_lost(scratch, first, "first"), succeed], order)
    assert ends[1] == "done"
    assert store.handle(STAGE.id).verify(thorough=True).state == "done"
    content = (store.handle(STAGE.id).artifact / "model.bin").read_text()
    assert content == "second" or ends[0] == "done"
    assert [path.name for path in (store.root / STAGE.kind).iterdir()] == [STAGE.fingerprint]
