"""Cancelling what launchers run themselves."""

import os
import threading
from dataclasses import asdict, replace

import pytest
from hfprune_launch.local import cancel
from hfprune_launch.local.cancel import running_without_job, wait_until_cancelled
from made_stages import stage_of

from hfprune_dist.planning.plan import Plan
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.atomic_files import write_json
from hfprune_dist.store.claims import Holder
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a 0.2", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})
PLAN = Plan({STAGE.id: STAGE}, (), (STAGE.id,))


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def test_a_launcher_is_waited_for_and_named_if_it_does_not_end(store, monkeypatch):
    claim = store.handle(STAGE.id).claim()
    threading.Timer(0.2, claim.release).start()
    (line,) = wait_until_cancelled(PLAN, store)
    assert line.startswith("cancelled: prune a 0.2: process ") and running_without_job(PLAN, store) == {}
    monkeypatch.setattr(cancel, "WAIT_S", 0.2)
    write_json(store.handle(STAGE.id).work / "claim.2", asdict(replace(Holder.me(), host="elsewhere")))
    (line,) = wait_until_cancelled(PLAN, store)
    assert line.startswith("not cancelled yet: prune a 0.2: process") and f"kill {os.getpid()} ends it" in line
