"""Files are replaced as a whole and durably, what can't be read is absent, modes follow the umask, JSON is JSON."""

import errno
import os
from pathlib import Path

import pytest

from hfprune_dist.store import atomic_files
from hfprune_dist.store.atomic_files import (
    READING_ATTEMPTS,
    fsync_folders,
    listed,
    publish,
    read_json,
    write_json,
    write_text,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(params=[0o027, 0o002])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_the_umask_is_read_with_and_without_linux(umask, tmp_path):
    status = tmp_path / "status"
    assert atomic_files._umask(status) == umask and atomic_files._umask() == umask
    status.write_text("Name:\tpython\nUmask:\t0137\n")
    assert atomic_files._umask(status) == 0o137
    assert atomic_files.usual_mode() == 0o666 & ~umask


def test_numbers_that_json_has_no_word_for_are_refused(tmp_path):
    atomic_files.write_json(tmp_path / "a.json", {"b": 1, "a": None}, sort_keys=False)
    assert list(atomic_files.read_json(tmp_path / "a.json")) == ["b", "a"]
    with pytest.raises(ValueError, match="JSON"):
        atomic_files.write_json(tmp_path / "a.json", [float("nan")])
    assert atomic_files.read_json(tmp_path / "a.json") == {"b": 1, "a": None}


@pytest.fixture
def flushed(monkeypatch):
    """Paths in the order in which they are flushed, each with its content at that time; None for folders."""
    seen = []

    def flush(path):
        seen.append((path, path.read_text() if path.is_file() else None))

    monkeypatch.setattr(atomic_files, "fsync_path", flush)
    return seen


@pytest.mark.parametrize("value", [float("nan"), {1, 2}])
def test_what_can_not_be_written_leaves_the_file_as_it_was(tmp_path, value):
    file = tmp_path / "state.json"
    write_json(file, {"b": "é", "a": 1})
    before = file.read_bytes()
    with pytest.raises((TypeError, ValueError)):
        write_json(file, value)
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud800")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    assert read_json(file) == {"b": "é", "a": 1}


def test_a_value_has_the_same_bytes_in_whatever_order_its_keys_came(tmp_path):
    for number, value in enumerate(({"b": 2, "a": 1}, {"a": 1, "b": 2})):
        write_json(tmp_path / f"{number}", value)
    assert (tmp_path / "0").read_bytes() == (tmp_path / "1").read_bytes() == b'{\n "a": 1,\n "b": 2\n}\n'


def test_a_published_file_is_on_disk_before_it_has_its_name_and_its_name_afterwards(tmp_path, flushed):
    file, draft = tmp_path / "weights", tmp_path / ".draft"
    file.write_text("old")
    draft.touch(mode=0o600)
    draft.write_text("new")
    publish(draft, file)
    assert flushed == [(draft, "new"), (tmp_path, None)] and file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == atomic_files.usual_mode() and not draft.exists()


def test_folders_are_flushed_up_to_the_root_and_no_further(tmp_path, flushed):
    fsync_folders(tmp_path / "a" / "b", tmp_path)
    assert [path for path, _ in flushed] == [tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    flushed.clear()
    fsync_folders(tmp_path, tmp_path)
    assert [path for path, _ in flushed] == [tmp_path]


READERS = {"file": (Path, "read_text", read_json), "folder": (Path, "iterdir", lambda file: listed(file.parent, "*"))}


@pytest.fixture(params=READERS)
def stale(request, tmp_path, monkeypatch):
    """Return a function that lets NFS say so many times that what a reader has opened is stale, and then reads."""
    (tmp_path / "state.json").write_text("3")
    owner, name, read = READERS[request.param]
    original = getattr(owner, name)

    def reading(times, number=errno.ESTALE):
        answers = [number] * times

        def answer(path, **how):
            if answers:
                raise OSError(answers.pop(), "refused")
            return original(path, **how)

        monkeypatch.setattr(owner, name, answer)
        return read(tmp_path / "state.json"), len(answers)

    return reading


def test_what_is_stale_is_read_again(stale):
    found, _ = stale(0)
    assert stale(1) == stale(READING_ATTEMPTS - 1) == (found, 0)


def test_what_stays_stale_or_fails_in_another_way_is_an_error(stale):
    with pytest.raises(OSError, match="refused") as caught:
        stale(READING_ATTEMPTS)
    assert caught.value.errno == errno.ESTALE
    with pytest.raises(OSError, match="refused") as caught:
        stale(1, errno.EIO)
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("is_done", [True, False])
def test_a_replacement_whose_answer_was_lost_is_no_failure(tmp_path, monkeypatch, is_done):
    """NFS repeats the request, and is told that there is no draft."""
    replace, file = Path.replace, tmp_path / "state"
    file.write_text("old")

    def answered_late(draft, target):
        if is_done:
            replace(draft, target)
        else:
            draft.unlink()
        raise FileNotFoundError

    monkeypatch.setattr(Path, "replace", answered_late)
    if is_done:
        write_text(file, "new")
    else:
        with pytest.raises(FileNotFoundError):
            write_text(file, "new")
    assert file.read_text() == ("new" if is_done else "old") and list(tmp_path.iterdir()) == [file]
