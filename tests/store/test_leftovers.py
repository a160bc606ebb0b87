"""What is removed to make room may be in use, or vanish, at this moment."""

import os
from pathlib import Path

import pytest
from made_stages import stage_of

from hfprune_dist.errors import UserError
from hfprune_dist.store.artifacts import Store
from hfprune_dist.store.leftovers import files_of
from hfprune_dist.store.stage import Input

STAGE = stage_of("prune", "a label", {"ratio": 0.2}, {"model": Input("digest", "/somewhere")})


def test_files_in_use_do_not_count_as_removed(tmp_path, monkeypatch):
    """On NFS, they stay under another name as long as they are open."""
    store = Store(tmp_path)
    draft = store.handle(STAGE.id).open_draft()
    (draft / "model.bin").write_text("weights")
    store.handle(STAGE.id).commit(STAGE, draft, {"metrics": {}})
    leftover, unlink = files_of(store.handle(STAGE.id), "an intermediate checkpoint"), os.unlink
    assert leftover.size_bytes == len("weights")
    with monkeypatch.context() as patch:
        patch.setattr(os, "unlink", lambda path, **how: Path(path).rename(leftover.path / ".nfs0001"))
        with pytest.raises(UserError, match="part of it can't be removed; is it another user's, or in use"):
            leftover.remove()
    unlink(leftover.path / ".nfs0001")
    assert files_of(store.handle(STAGE.id), "an intermediate checkpoint").size_bytes == 0
