"""Modes of new files follow the umask, which is read without being changed."""

import os
from pathlib import Path

import pytest

from hfprune_dist.store import atomic_files


@pytest.fixture(params=[0o022, 0o027, 0o077, 0o002])
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


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
def test_threads_never_see_another_umask(umask, monkeypatch):
    monkeypatch.setattr(os, "umask", lambda mask: pytest.fail("set while other threads make files"))
    assert atomic_files.usual_mode() == 0o666 & ~umask
    monkeypatch.undo()
