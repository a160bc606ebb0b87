"""What ranks report: heartbeats, the time left, and why they failed."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from made_stages import stage_of

from hfprune_dist.errors import UserError
from hfprune_dist.store import heartbeat
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.heartbeat import Failure, Progress, in_one_line

STAGE = stage_of("prune", "a label", {"ratio": 0.2}, {})
GARBLED = ["{", "[]", '{"phase": 1, "done": "x", "total": []}']
LOST = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:49152"


@pytest.fixture
def handle(tmp_path):
    handle = Store(tmp_path).handle(STAGE.id)
    handle.work.mkdir(parents=True)
    return handle


@pytest.mark.parametrize("content", GARBLED)
def test_what_is_half_written_or_foreign_is_not_there(handle, content):
    (handle.work / "progress.json").write_text(content)
    (handle.work / "failure.0.json").write_text(content)
    assert handle.heartbeat() is None and handle.failure() is None
    handle.report_failure(Failure("input", "why", 1, 0.0))
    assert handle.failure().message == "why"
    handle.clear_failures()
    handle.discard_work()
    assert handle.heartbeat() is None and handle.failure() is None


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


RECORDS = [
    ("input", "no such text"),
    ("lost input", "set aside"),
    ("bad node", "no GPU"),
    ("code", "wrong"),
    ("code", LOST),
]


@settings(max_examples=60)
@given(
    kinds=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    skews=st.lists(st.floats(-500, 500), min_size=5, max_size=5),
)
def test_the_best_explanation_does_not_depend_on_clocks(tmp_path_factory, kinds, skews):
    """Each rank's host has a clock of its own."""
    handle = Store(tmp_path_factory.mktemp("store")).handle(STAGE.id)
    handle.work.mkdir(parents=True)
    for rank, (kind, skew) in enumerate(zip(kinds, skews, strict=False)):
        handle.report_failure(Failure(*RECORDS[kind], rank, time.time() + skew))
    found, best = handle.failure(), min(kinds)
    assert (found.cause, found.message) in (RECORDS[:2] if best <= 1 else [RECORDS[best]])


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("a rank died: rank 0 by SIGKILL, from outside\nits log ends with:\n  ====", "a rank died: rank 0 by SIGKILL"),
        ('File "a.py", line 1, in f\n    x()\nValueError: no', "ValueError: no"),
        ('Traceback (most recent call last):\n  File "a.py"\nOSError: full', "OSError: full"),
        ("", ""),
    ],
)
def test_a_failure_in_one_line(message, line):
    assert in_one_line(message).startswith(line) and "\n" not in in_one_line(message)


def test_an_exception_is_told_by_its_last_line_and_by_its_attempt():
    failure = Failure.from_error(UserError("bad"), 0, 7)
    assert (failure.cause, failure.message, failure.attempt) == ("input", "bad", 7)
    try:
        int("x")
    except ValueError as error:
        failure = Failure.from_error(error, 0, 1)
    assert failure.cause == "code" and in_one_line(failure.message).startswith("ValueError: invalid literal")
    assert Failure.from_error(MemoryError("can't allocate memory"), 0, 1).cause == "out of memory"
