"""Files are replaced as a whole and durably, what can't be read is absent, modes follow the umask, JSON is JSON."""

import errno
import os
import tempfile
from pathlib import Path
from unittest import mock

import pytest

from hfprune_dist.errors import UserError
from hfprune_dist.store import atomic_files
from hfprune_dist.store.atomic_files import (
    READING_ATTEMPTS,
    listed,
    publish,
    read_json,
    refuse_world_writable,
    require_usable,
    unwritable,
    write_json,
    write_text,
)


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


@pytest.mark.parametrize("inside", [(), ("model.bin",)])
def test_what_is_published_is_on_disk_before_it_has_its_name_and_its_name_afterwards(tmp_path, monkeypatch, inside):
    place, draft, flushed = tmp_path / "weights", tmp_path / ".draft", []
    monkeypatch.setattr(atomic_files, "fsync_path", lambda path: flushed.append((path, draft.exists())))
    draft.mkdir() if inside else place.write_text("old")
    draft.joinpath(*inside).touch(mode=0o600)
    before = os.umask(0o027)
    publish(draft, place)
    assert os.umask(before) == 0o027
    assert flushed == [*((draft / name, True) for name in inside), (draft, True), (tmp_path, False)]
    assert place.joinpath(*inside).read_text() == "" and place.joinpath(*inside).stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("reader", ["read_text", "iterdir"])
def test_what_is_stale_is_read_again(tmp_path, monkeypatch, reader):
    """NFS says so of a file or folder that another host has replaced since it was opened."""
    (tmp_path / "state.json").write_text("3")
    original, answers = getattr(Path, reader), []

    def answer(path, **how):
        if answers:
            raise OSError(answers.pop(), "refused")
        return original(path, **how)

    def read():
        return read_json(tmp_path / "state.json"), listed(tmp_path, "*")

    monkeypatch.setattr(Path, reader, answer)
    answers += [errno.ESTALE] * (READING_ATTEMPTS - 1)
    assert read() == (3, [tmp_path / "state.json"]) and not answers
    for answers[:] in ([errno.ESTALE] * READING_ATTEMPTS, [errno.EIO]):
        with pytest.raises(OSError, match="refused"):
            read()


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
    with pytest.raises(UserError, match=r"no hard links.*\(Operation not supported\)"):
        require_usable(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_or_quota_and_a_disk_that_can_only_be_read_are_named(tmp_path, monkeypatch, number):
    assert unwritable(tmp_path) == "" and not list(tmp_path.iterdir())
    monkeypatch.setattr(tempfile, "TemporaryFile", mock.Mock(side_effect=OSError(number, "")))
    assert unwritable(tmp_path).startswith(f"{tmp_path}: {os.strerror(number)}; ")


def test_a_folder_to_which_everybody_can_write_runs_nobodys_jobs(tmp_path):
    refuse_world_writable(tmp_path, tmp_path / "none")
    tmp_path.chmod(0o2775)
    refuse_world_writable(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match=r"everybody can write to it.*umask 002, chmod g\+s"):
        refuse_world_writable(tmp_path)
