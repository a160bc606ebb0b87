import errno
import os
import shutil
from types import SimpleNamespace

import pytest

from hfprune_dist.errors import UserError
from hfprune_dist.store.file_system import require_own, require_usable, unwritable


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
