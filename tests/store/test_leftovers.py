"""What is removed to make room may be in use, or vanish, at this moment."""

import os
import shutil
from pathlib import Path

import pytest
from made_stages import stage_of

from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.leftovers import files_of, size_of
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a label", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})


def test_files_in_use_do_not_count_as_removed(tmp_path, monkeypatch):
    """On NFS, they stay under another name as long as they are open."""
    store = Store(tmp_path)
    draft = store.open_draft(STAGE.id)
    (draft / "model.bin").write_text("weights")
    store.commit(STAGE, draft, {"metrics": {}})
    leftover, unlink = files_of(store.handle(STAGE.id), "an intermediate checkpoint"), os.unlink
    assert leftover.size_bytes == len("weights")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda path, **how: Path(path).rename(leftover.path / ".nfs0001"))
        with pytest.raises(UserError, match="part of it can't be removed; is it another user's, or in use"):
            leftover.remove()
    unlink(leftover.path / ".nfs0001")
    assert files_of(store.handle(STAGE.id), "an intermediate checkpoint").size_bytes == 0


def test_a_file_that_vanishes_takes_no_room(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).write_text("12345")
    lstat = Path.lstat

    def gone(path):
        if path.name == "b":
            path.unlink()
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", gone)
    assert size_of(tmp_path) == 5


def test_a_folder_that_vanishes_takes_no_room(tmp_path, monkeypatch):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("12345")
    lstat = Path.lstat

    def other_gone(path):
        shutil.rmtree(tmp_path / ("b" if path.parent.name == "a" else "a"))
        return lstat(path)

    monkeypatch.setattr(Path, "lstat", other_gone)
    assert size_of(tmp_path) == 5
