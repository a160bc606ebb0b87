"""The model of a crash, applied to sequences of a few calls."""

import os

import pytest

from faults.crash import Recorder, states_of
from hfprune_dist.store.atomic_files import fsync_path


@pytest.fixture
def recorded(tmp_path):
    """Return a function that records an action below a folder and returns path -> text for each state of a crash."""

    def record(action):
        recorder = Recorder(tmp_path)
        recorder.arm()
        try:
            action(tmp_path)
        finally:
            recorder.disarm()
        states = enumerate(states_of(recorder.recording))
        return [_texts(state, tmp_path / f"state-{number}") for number, state in states]

    return record


def _texts(state, folder):
    state.write(folder)
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


def replace(folder, text, *, fsync):
    with (folder / "draft").open("w") as stream:
        stream.write(text)
        stream.flush()
        if fsync:
            os.fsync(stream.fileno())
    (folder / "draft").replace(folder / "file")


def test_a_rename_of_what_was_not_flushed_may_leave_a_name_with_nothing_in_it(tmp_path, recorded):
    (tmp_path / "file").write_text("old text")
    states = recorded(lambda folder: replace(folder, "new text", fsync=False))
    assert {"file": ""} in states and {"file": "new "} in states and {"file": "new \0\0\0\0"} in states
    assert {"file": "old text"} in states and {"file": "new text"} in states


def test_what_was_flushed_before_its_rename_is_old_or_new(tmp_path, recorded):
    (tmp_path / "file").write_text("old text")
    states = recorded(lambda folder: replace(folder, "new text", fsync=True))
    assert {state["file"] for state in states} == {"old text", "new text"}
    assert {state.get("draft") for state in states} == {None, "", "new ", "new \0\0\0\0", "new text"}


def test_of_several_files_at_risk_each_may_be_lost_alone(recorded):
    states = recorded(lambda folder: [(folder / name).write_text("text") for name in ("a", "b")])
    for lost in ({"a": ""}, {"b": ""}, {"a": "", "b": ""}):
        assert {"a": "text", "b": "text", **lost} in states


def test_names_reach_the_disk_in_their_order_and_stay_once_a_folder_was_flushed(tmp_path):
    recorder = Recorder(tmp_path)
    recorder.arm()
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    fsync_path(tmp_path / "a")
    recorder.mark("flushed")
    (tmp_path / "c").mkdir()
    recorder.disarm()
    left = [(bool(state.marks), "".join(sorted(state.names))) for state in states_of(recorder.recording)]
    assert left == [(False, ""), (False, "a"), (False, "ab"), (True, "ab"), (True, "abc")]
