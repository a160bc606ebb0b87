import errno
import os

import pytest

from hfprune_dist.errors import UserError
from hfprune_dist.store.file_system import LEFT_BEHIND_S, require_own, require_usable


def test_a_usable_folder_is_made_and_left_empty(tmp_path):
    require_usable(tmp_path / "runs" / "out")
    assert list((tmp_path / "runs" / "out").iterdir()) == []


def test_an_unwritable_folder_is_named(tmp_path):
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(UserError, match=r"can't be written to .*choose another --out"):
        require_usable(blocker / "out")


def test_a_file_system_without_hard_links_is_named(tmp_path, monkeypatch):
    """Examples are FAT and many mounts of cloud storage."""

    def link(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(UserError, match=r"no hard links on this file system \(Operation not supported\)"):
        require_usable(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_a_dead_process_left_goes_and_what_a_living_one_needs_stays(tmp_path):
    *left, in_use = (tmp_path / f".probe-{name}" for name in ("00000000", "00000000-twin", "22222222", "11111111"))
    for probe in (*left, in_use):
        probe.touch()
    an_age_ago = in_use.stat().st_mtime - 2 * LEFT_BEHIND_S
    for probe in left:
        os.utime(probe, (an_age_ago, an_age_ago))
    require_usable(tmp_path)
    assert list(tmp_path.iterdir()) == [in_use]


def test_a_folder_to_which_everybody_can_write_runs_nobodys_jobs(tmp_path):
    require_own(tmp_path, tmp_path / "none")
    tmp_path.chmod(0o2775)
    require_own(tmp_path)
    tmp_path.chmod(0o777)
    with pytest.raises(UserError, match="everybody can write to it"):
        require_own(tmp_path)
