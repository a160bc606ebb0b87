"""What ranks report: heartbeats, and the time left."""

import time

import pytest
from made_stages import stage_of

from hfprune_dist.store import heartbeat
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Progress

STAGE = stage_of("prune", "a label", {"ratio": 0.2}, {})


@pytest.fixture
def handle(tmp_path):
    handle = Store(tmp_path).handle(STAGE.id)
    handle.work.mkdir(parents=True)
    return handle


@pytest.mark.parametrize("set_by", [-600.0, 0.0, 600.0])
def test_time_left_is_by_the_pace_of_the_phase_and_of_this_attempt(handle, monkeypatch, set_by):
    """Neither earlier phases nor what an earlier attempt did of this phase matter, nor a clock that is set."""
    now, unix = [0.0], time.time()
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    written = Progress(handle.work)

    def left(at, *update):
        now[0] = float(at)
        monkeypatch.setattr(heartbeat.time, "time", lambda: unix + at + (set_by if at > 305 else 0))
        written.update(*update)
        return handle.heartbeat().seconds_left

    assert left(100, "shards", 1, 2) is None, "one word is no pace"
    assert left(200, "shards", 2, 2) is None, "nothing is left"
    assert left(300, "layers", 4, 10) is None
    assert left(310, "layers", 5, 10) == pytest.approx(50.0) and left(320, "layers", 8, 10) == pytest.approx(10.0)
    assert left(400, "layers", 1, 10) is None, "the phase again"
    assert left(401, "layers", 2, 10) == pytest.approx(8.0)


def test_heartbeats_are_written_at_most_twice_a_second_but_for_the_last(handle, monkeypatch):
    now, guarded = [1000.0], []
    monkeypatch.setattr(heartbeat.time, "monotonic", lambda: now[0])
    progress = Progress(handle.work, lambda: guarded.append(now[0]))

    def told(seconds, done):
        now[0] = 1000.0 + seconds
        progress.update("shards", done, 9)
        return handle.heartbeat().done

    assert [told(0, 1), told(0.25, 2), told(0.5, 3), told(0.75, 4), told(0.75, 9)] == [1, 1, 3, 3, 9]
    assert guarded == [1000.0, 1000.5, 1000.75]
    with pytest.raises(ZeroDivisionError):
        Progress(handle.work, lambda: 1 / 0).update("shards", 1, 9)
    assert handle.heartbeat().done == 9, "who lost the stage says nothing any more"
    Progress(None, lambda: 1 / 0).update("shards", 1, 9)
