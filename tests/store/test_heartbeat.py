"""What ranks leave is read by other processes at any moment, and on other hosts."""

import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hfprune_dist.errors import UserError
from hfprune_dist.store import heartbeat as progress
from hfprune_dist.store.heartbeat import (
    Failure,
    Progress,
    clear_failures,
    in_one_line,
    read_failure,
    read_heartbeat,
    write_failure,
    write_failure_record,
)

GARBLED = ["", "{", "[]", "3", "null", '{"phase": "x"}', '{"cause": "code"}', '{"phase": 1, "done": "x", "total": []}']
LOST = "RuntimeError: [../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:49152"


@pytest.mark.parametrize("content", GARBLED)
def test_what_is_half_written_or_foreign_is_not_there(tmp_path, content):
    (tmp_path / "progress.json").write_text(content)
    (tmp_path / "failure.0.json").write_text(content)
    assert read_heartbeat(tmp_path) is None and read_failure(tmp_path) is None
    write_failure_record(tmp_path, Failure("input", "why", 1, 0.0))
    assert read_failure(tmp_path).message == "why"


def test_time_left_is_by_the_pace_of_the_phase_and_of_this_attempt(tmp_path):
    """Neither earlier phases nor what an earlier attempt did of this phase matter."""
    now = [0.0]
    written = Progress(tmp_path, clock=lambda: now[0])

    def left(at, *update):
        now[0] = float(at)
        written.update(*update)
        return read_heartbeat(tmp_path).seconds_left

    assert left(100, "shards", 1, 2) is None, "one word is no pace"
    assert left(200, "shards", 2, 2) is None, "nothing is left"
    assert left(300, "layers", 4, 10) is None
    assert left(310, "layers", 5, 10) == pytest.approx(50.0) and left(320, "layers", 8, 10) == pytest.approx(10.0)
    assert left(400, "layers", 1, 10) is None, "the phase again"
    assert left(401, "layers", 2, 10) == pytest.approx(8.0)


def test_a_work_folder_that_is_gone_holds_nothing(tmp_path):
    assert read_failure(tmp_path / "gone") is None and read_heartbeat(tmp_path / "gone") is None
    clear_failures(tmp_path / "gone")


RECORDS = [
    Failure("input", "no such text", 3, 0.0),
    Failure("lost input", "set aside", 3, 0.0),
    Failure("bad node", "no GPU", 3, 0.0),
    Failure("code", "ValueError: we are wrong", 3, 0.0),
    Failure("code", LOST, 3, 0.0),
]


@settings(max_examples=60)
@given(
    kinds=st.lists(st.integers(0, 4), min_size=1, max_size=5),
    skews=st.lists(st.floats(-500, 500), min_size=5, max_size=5),
)
def test_the_best_explanation_does_not_depend_on_clocks(tmp_path_factory, kinds, skews):
    """Each rank's host has a clock of its own."""
    work = tmp_path_factory.mktemp("work")
    for rank, (kind, skew) in enumerate(zip(kinds, skews, strict=False)):
        write_failure_record(work, Failure(RECORDS[kind].cause, RECORDS[kind].message, rank, time.time() + skew))
    found = read_failure(work).cause, read_failure(work).message
    best = min(kinds)
    if best <= 1:
        assert found[0] in ("input", "lost input")
    else:
        assert found == (RECORDS[best].cause, RECORDS[best].message)


@settings(max_examples=40)
@given(attempt=st.integers(1, 3), mine=st.integers(1, 3), skew=st.floats(-500, 500))
def test_a_failure_belongs_to_the_attempt_that_it_names(attempt, mine, skew):
    assert Failure("input", "", 0, 1000.0 + skew, attempt).is_of(mine, created=1000.0) == (attempt == mine)


def test_a_rank_says_which_attempt_failed(tmp_path):
    write_failure(tmp_path, UserError("bad"), 0, 7)
    assert read_failure(tmp_path).attempt == 7


@pytest.mark.parametrize("set_by", [-600.0, 600.0])
def test_a_clock_that_is_set_silences_nobody_and_changes_no_pace(tmp_path, monkeypatch, set_by):
    now, wrong = [1000.0], time.time() + set_by
    beat = Progress(tmp_path, clock=lambda: now[0])
    beat.update("shards", 1, 9)
    monkeypatch.setattr(progress.time, "time", lambda: wrong)
    now[0] += 10
    beat.update("shards", 2, 9)
    assert read_heartbeat(tmp_path).done == 2
    assert read_heartbeat(tmp_path).seconds_left == pytest.approx(70.0)


def test_heartbeats_are_written_at_most_twice_a_second_but_for_the_last_and_guarded_where_they_are(tmp_path):
    now, guarded = [1000.0], []

    def clock():
        return now[0]

    beat, silent = Progress(tmp_path, lambda: guarded.append(now[0]), clock), Progress(None, lambda: 1 / 0, clock)

    def told(seconds, done):
        now[0] = 1000.0 + seconds
        beat.update("shards", done, 9)
        silent.update("shards", done, 9)
        return read_heartbeat(tmp_path).done

    assert [told(0, 1), told(0.25, 2), told(0.5, 3), told(0.75, 4), told(0.75, 9)] == [1, 1, 3, 3, 9]
    assert guarded == [1000.0, 1000.5, 1000.75]
    beat = Progress(tmp_path, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        told(9, 1)
    assert read_heartbeat(tmp_path).done == 9, "who lost the stage says nothing any more"


@pytest.mark.parametrize(
    ("message", "line"),
    [
        ("model 'a': ratio 0.9 can't be reached", "model 'a': ratio 0.9 can't be reached"),
        (
            "a rank died without a message: rank 0 by SIGKILL, from outside\nits log ends with:\n  =====",
            "rank 0 by SIG",
        ),
        ('File "a.py", line 1, in f\n    x()\nValueError: no', "ValueError: no"),
        ('Traceback (most recent call last):\n  File "a.py"\nOSError: full', "OSError: full"),
        ("", ""),
    ],
)
def test_a_failure_in_one_line(message, line):
    found = in_one_line(message)
    assert line in found and "\n" not in found and "===" not in found


def test_an_exception_is_told_by_its_last_line(tmp_path):
    try:
        int("x")
    except ValueError as error:
        write_failure(tmp_path, error, 0, 1)
    failure = read_failure(tmp_path)
    assert in_one_line(failure.message).startswith("ValueError: invalid literal")
