"""Files are replaced as a whole and durably, what can't be read is absent, modes follow the umask, JSON is JSON."""

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from hfprune_dist.errors import UserError
from hfprune_dist.store import atomic_files
from hfprune_dist.store.atomic_files import (
    READING_ATTEMPTS,
    listed,
    publish,
    read_json,
    require_own,
    require_usable,
    unwritable,
    write_json,
    write_text,
)


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
    assert before == b'{\n "a": 1,\n "b": "\\u00e9"\n}\n', "in whatever order its keys came"
    with pytest.raises((TypeError, ValueError)):
        write_json(file, value)
    with pytest.raises(UnicodeEncodeError):
        write_text(file, "\ud800")
    assert file.read_bytes() == before and list(tmp_path.iterdir()) == [file]
    assert read_json(file) == {"b": "é", "a": 1}


def test_a_published_file_is_on_disk_before_it_has_its_name_and_its_name_afterwards(tmp_path, flushed):
    file, draft = tmp_path / "weights", tmp_path / ".draft"
    file.write_text("old")
    draft.touch(mode=0o600)
    draft.write_text("new")
    before = os.umask(0o027)
    publish(draft, file)
    assert os.umask(before) == 0o027
    assert flushed == [(draft, "new"), (tmp_path, None)] and file.read_text() == "new"
    assert file.stat().st_mode & 0o777 == 0o640 and not draft.exists()


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


# What a store needs of its file system.


def test_a_usable_folder_is_made_and_left_empty_and_another_is_named(tmp_path):
    require_usable(tmp_path / "runs" / "out")
    assert list((tmp_path / "runs" / "out").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"can't be written to .*choose another --out"):
        require_usable(tmp_path / "file" / "out")


def test_a_file_system_without_hard_links_is_named(tmp_path, monkeypatch):
    """Examples are FAT and many mounts of cloud storage."""

    def link(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError, match=r"no hard links on this file system \(Operation not supported\)"):
        require_usable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_and_one_that_can_only_be_read_are_named(tmp_path, monkeypatch):
    assert unwritable(tmp_path) == ""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=9))
        assert "No space left on device" in unwritable(tmp_path)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_RDONLY))
    assert "Read-only file system" in unwritable(tmp_path)


def test_a_folder_to_which_everybody_can_write_runs_nobodys_jobs(tmp_path):
    require_own(tmp_path, tmp_path / "none")
    tmp_path.chmod(0o2775)
    require_own(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match=r"everybody can write to it.*umask 002, chmod g\+s"):
        require_own(tmp_path)
